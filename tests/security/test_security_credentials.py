"""What the authority issues, and what is said of files that do not do."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from gptfl_dist.errors import IdentityError
from gptfl_dist.files import write_file
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.security.credentials import identity_in, load_credentials, replace_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.trust import FileTrust

AUTHORITY = Authority.new("fed", valid=timedelta(days=1))


def read(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate)


@pytest.mark.parametrize(
    ("credentials", "uri", "usage"),
    [
        (AUTHORITY.issue_coordinator(["host.example", "127.0.0.1", "::1"]), "gptfl://fed/coordinator",
         ExtendedKeyUsageOID.SERVER_AUTH),
        (AUTHORITY.issue_silo("ward-3"), "gptfl://fed/silo/ward-3", ExtendedKeyUsageOID.CLIENT_AUTH),
    ],
)  # fmt: skip
def test_a_certificate_says_one_thing_only(credentials, uri, usage):
    certificate = read(credentials)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]
    extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(extended.value) == [usage]
    assert extended.critical
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=1)
    leaf, issuing = x509.load_pem_x509_certificates(credentials.certificate)
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.roots))


def test_the_coordinator_is_found_under_its_names_and_addresses():
    certificate = read(AUTHORITY.issue_coordinator(["host.example", "127.0.0.1", "::1"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["host.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]


def test_a_silo_cannot_issue_and_only_the_root_can_delegate():
    root = x509.load_pem_x509_certificate(AUTHORITY.roots)
    leaf, issuing = x509.load_pem_x509_certificates(AUTHORITY.issue_silo("a").certificate)
    for certificate, below in ((root, 2), (issuing, 0)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert constraints.ca
        assert constraints.path_length == below
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert not usage.key_cert_sign


@pytest.fixture
def folder(tmp_path):
    AUTHORITY.issue_silo("alice").save(tmp_path)
    return tmp_path


def load(folder):
    return load_credentials(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")


def test_what_was_saved_is_loaded_and_only_its_owner_can_read_it(tmp_path):
    credentials = AUTHORITY.issue_silo("alice")
    credentials.save(tmp_path / "new")
    assert load(tmp_path / "new") == (credentials, Identity("fed", "silo", "alice"))
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "key.pem").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["authority.pem", "certificate.pem", "key.pem"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"hello"), "not a"),
        (lambda path: path.write_bytes(b""), "not a"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "not a"),
        (lambda path: path.write_bytes(b"x" * (2 << 20)), "too large"),
    ],
)
def test_a_missing_or_broken_file_is_named(folder, name, damage, said):
    damage(folder / name)
    with pytest.raises(IdentityError, match=said) as error:
        load(folder)
    assert str(folder / name) in error.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(folder, mode):
    (folder / "key.pem").chmod(mode)
    with pytest.raises(IdentityError, match="others may read") as error:
        load(folder)
    assert "chmod 600" in error.value.hint


def test_a_key_of_another_certificate_is_refused(folder):
    (folder / "key.pem").write_bytes(AUTHORITY.issue_silo("alice").key)
    with pytest.raises(IdentityError, match=r"is not the key of .*certificate\.pem"):
        load(folder)


def test_a_key_with_a_password_is_refused(folder):
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (folder / "key.pem").write_bytes(locked)
    with pytest.raises(IdentityError, match="not an unencrypted PEM private key"):
        load(folder)


def test_a_certificate_of_another_authority_is_refused(folder):
    (folder / "authority.pem").write_bytes(Authority.new("fed", valid=timedelta(days=1)).roots)
    with pytest.raises(IdentityError, match="was not issued by"):
        load(folder)


@pytest.mark.parametrize(
    ("role", "advice"),
    [
        ("silo", "gptfl invite FEDERATION_FILE alice;"),
        ("operator", "gptfl invite FEDERATION_FILE alice --role operator;"),
    ],
)
def test_an_expired_certificate_is_refused_and_how_to_get_another_is_said(tmp_path, role, advice):
    Authority.new("fed", valid=timedelta(seconds=-10)).issue(role, "alice").save(tmp_path)
    with pytest.raises(IdentityError, match=r"valid .* and now it is") as error:
        load(tmp_path)
    assert advice in error.value.hint
    assert "then gptfl join" in error.value.hint
    assert "clock" in error.value.hint


def test_an_expired_authority_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("gptfl_dist.security.authority._ROOT_VALID", timedelta(seconds=-10))
    Authority.new("fed", valid=timedelta(days=1)).issue_silo("alice").save(tmp_path)
    with pytest.raises(IdentityError, match=r"authority\.pem: valid .* and now it is"):
        load(tmp_path)


def test_one_of_several_roots_will_do(folder):
    """While a root is replaced, all sides trust the old and the new one."""
    other = Authority.new("fed", valid=timedelta(days=1)).roots
    own = (folder / "authority.pem").read_bytes()
    for roots in (other + own, own + other):
        (folder / "authority.pem").write_bytes(roots)
        assert load(folder)[1].name == "alice"


def test_a_chain_that_breaks_is_refused(folder):
    leaf = (folder / "certificate.pem").read_bytes().partition(b"-----END CERTIFICATE-----\n")
    (folder / "certificate.pem").write_bytes(leaf[0] + leaf[1])
    with pytest.raises(IdentityError, match="was not issued by"):
        load(folder)


@pytest.mark.parametrize("uris", [[], ["gptfl://fed/silo/alice", "gptfl://fed/silo/bob"], ["https://fed/alice"]])
def test_a_certificate_without_exactly_one_uri_of_ours_is_refused(tmp_path, uris):
    own = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(own.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    )  # fmt: skip
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(own, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Credentials(pem, pem, key).save(tmp_path)
    with pytest.raises(IdentityError, match="expected"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["authority", "certificate"])
def test_a_certificate_of_no_version_that_there_is_is_named(folder, name):
    """cryptography raises an error of its own for it, which is no ValueError."""
    path = folder / f"{name}.pem"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    version = bytes.fromhex("a003020102")
    assert der.count(version) == 1
    text = b64encode(der.replace(version, bytes.fromhex("a003020142"))).decode()
    path.write_text(f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
    with pytest.raises(IdentityError, match=rf"{name}\.pem: not a PEM certificate"):
        load(folder)
    with pytest.raises(IdentityError, match="expected exactly one"):
        identity_in(path.read_bytes(), "it")


def test_credentials_that_somebody_replaced_are_read_anew_and_half_replaced_ones_are_not(folder):
    trust = FileTrust(folder / "certificate.pem", lambda: load(folder)[0])
    first = trust.credentials()
    assert trust.credentials() is first
    new = AUTHORITY.issue_silo("alice")
    write_file(folder / "certificate.pem", new.certificate)  # whose key is not there yet
    assert trust.credentials() is first
    write_file(folder / "key.pem", new.key)
    assert trust.credentials() == new


@pytest.mark.parametrize("written", range(4))
def test_a_replacement_that_was_cut_short_leaves_a_pair_that_fits(folder, monkeypatch, written):
    """Killed after any of its steps, it leaves the old pair or the new one, and nobody has to mend anything."""
    old, new = load(folder)[0], AUTHORITY.issue_silo("alice")
    left = [None] * written

    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    def write(path, content):
        if not left:
            killed()
        left.pop()
        write_file(path, content)

    monkeypatch.setattr("gptfl_dist.security.credentials.write_file", write)
    if written == 3:  # before the last step, the renaming
        named = iter([folder / "key.pem.next"])
        monkeypatch.setattr("gptfl_dist.security.credentials.next_of", lambda _: next(named, None) or killed())
    with pytest.raises(Killed):
        replace_credentials(new, *(folder / f"{name}.pem" for name in ("authority", "certificate", "key")))
    monkeypatch.undo()
    assert load(folder)[0] == (new if written == 3 else old)
    assert load(folder)[0] == (new if written == 3 else old)
