"""An authority that is kept: its files, its rotation, and an institution's own authority above it."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from gptfl_dist.errors import IdentityError, ProtocolError, StorageError
from gptfl_dist.files import write_file
from gptfl_dist.security.authority import Credentials, make_root, new_key
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import Session
from gptfl_dist.security.vault import Vault

DAY = timedelta(days=1)
COORDINATOR = Identity("fed", "coordinator", "coordinator")
ALICE = Identity("fed", "silo", "alice")


@pytest.fixture
def vault(tmp_path):
    vault = Vault(tmp_path / "authority", "fed")
    vault.create()
    return vault


def meet(coordinator: Credentials, silo: Credentials) -> bool:
    """Whether a TLS session between the two comes about."""
    server, client = Session(coordinator, ALICE, "alice"), Session(silo, COORDINATOR, "the coordinator")
    try:
        words = client.step()
        for _ in range(4):
            words = server.step(words)
            if server.established:
                return client.established
            words = client.step(words)
    except (IdentityError, ProtocolError):
        return False
    return False


def test_what_is_kept_is_its_owners_alone_and_opens_again(vault):
    assert stat.S_IMODE(vault.folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in vault.folder.iterdir())
    first, again = vault.open(DAY), Vault(vault.folder, "fed").open(DAY)
    assert meet(first.issue_coordinator(["localhost"]), again.issue_silo("alice"))


def test_an_authority_is_not_written_over(vault):
    with pytest.raises(StorageError, match="an authority already"):
        vault.create()
    with pytest.raises(StorageError, match="an authority already"):
        vault.request_issuing()


def test_silos_issue_nothing_and_root_key_may_be_elsewhere(vault):
    (vault.folder / "root.key").rename(vault.folder.parent / "root.key")
    assert vault.open(DAY).issue_silo("alice")
    with pytest.raises(IdentityError, match=r"root\.key"):
        vault.rotate()
    (vault.folder.parent / "root.key").rename(vault.folder / "root.key")
    vault.rotate()


def test_a_rotation_cuts_nobody_off(vault):
    """Each pair of an old and a new side meets, until the old root is dropped."""
    old = vault.open(DAY)
    old_side, old_silo = old.issue_coordinator(["localhost"]), old.issue_silo("alice")
    vault.rotate()
    new = vault.open(DAY)
    new_side, new_silo = new.issue_coordinator(["localhost"]), new.issue_silo("alice")
    for coordinator in (old_side, new_side):
        for silo in (old_silo, new_silo):
            assert meet(coordinator, silo)
    vault.drop_old_root()
    last = vault.open(DAY)
    assert meet(last.issue_coordinator(["localhost"]), new_silo)
    assert not meet(last.issue_coordinator(["localhost"]), old_silo)
    assert len(vault.roots()) == 1


def test_a_second_rotation_waits_for_the_end_of_the_first(vault):
    vault.rotate()
    with pytest.raises(IdentityError, match="the one before it is still trusted") as error:
        vault.rotate()
    assert "--finish" in error.value.hint
    vault.drop_old_root()
    with pytest.raises(IdentityError, match="no root was replaced"):
        vault.drop_old_root()
    vault.rotate()


@pytest.mark.parametrize("written", range(4))
def test_a_rotation_that_was_cut_short_leaves_an_authority_that_works(vault, monkeypatch, written):
    silo = vault.open(DAY).issue_silo("alice")
    left = [None] * written

    class Killed(BaseException):
        pass

    def write(path, content):
        if not left:
            raise Killed
        left.pop()
        write_file(path, content)

    monkeypatch.setattr("gptfl_dist.security.credentials.write_file", write)
    monkeypatch.setattr("gptfl_dist.security.vault.write_file", write)
    with pytest.raises(Killed):
        vault.rotate()
    monkeypatch.undo()
    assert meet(vault.open(DAY).issue_coordinator(["localhost"]), silo)
    vault.rotate()
    assert meet(vault.open(DAY).issue_coordinator(["localhost"]), silo)
    vault.drop_old_root()
    last = vault.open(DAY)
    assert meet(last.issue_coordinator(["localhost"]), last.issue_silo("alice"))


@pytest.mark.parametrize("name", ["root.key", "issuing.key"])
def test_keys_that_others_may_read_are_not_used(vault, name):
    (vault.folder / name).chmod(0o644)
    with pytest.raises(IdentityError, match="others may read"):
        vault.rotate() if name == "root.key" else vault.open(DAY)


def signed(request: bytes, ca: bool | None = True) -> tuple[bytes, bytes]:
    """(certificate, root) of an authority of an institution's own for a request."""
    key = new_key()
    root = x509.load_pem_x509_certificate(make_root("hospital", key))
    asked = x509.load_pem_x509_csr(request)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(asked.subject)
        .issuer_name(root.subject)
        .public_key(asked.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - DAY)
        .not_valid_after(datetime.now(UTC) + DAY)
    )
    if ca is not None:
        certificate = certificate.add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), True)
    certificate = certificate.sign(key, hashes.SHA256())
    return tuple(each.public_bytes(serialization.Encoding.PEM) for each in (certificate, root))


def test_an_institutions_own_authority_can_stand_above(tmp_path):
    vault = Vault(tmp_path / "authority", "fed")
    certificate, root = signed(vault.request_issuing().read_bytes())
    assert not vault.exists
    (tmp_path / "chain.pem").write_bytes(certificate)
    (tmp_path / "root.pem").write_bytes(root)
    vault.install_issuing(tmp_path / "chain.pem", tmp_path / "root.pem")
    authority = vault.open(DAY)
    assert meet(authority.issue_coordinator(["localhost"]), authority.issue_silo("alice"))
    assert authority.roots == root


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        (lambda request: signed(request, ca=False)[0], "may not sign certificates"),
        (lambda request: signed(request, ca=None)[0], "may not sign certificates"),
        (lambda request: signed(request)[0], "was not issued by"),  # by another root than the one beside it
        (lambda request: make_root("fed", new_key()), "is no certificate for"),
    ],
)
def test_what_is_no_issuing_certificate_of_ours_is_not_installed(tmp_path, certificate, said):
    vault = Vault(tmp_path / "authority", "fed")
    request = vault.request_issuing().read_bytes()
    (tmp_path / "chain.pem").write_bytes(certificate(request))
    (tmp_path / "root.pem").write_bytes(make_root("hospital", new_key()))
    with pytest.raises(IdentityError, match=said):
        vault.install_issuing(tmp_path / "chain.pem", tmp_path / "root.pem")
    assert not vault.exists


def test_where_there_is_none_it_says_how_to_make_one(tmp_path):
    with pytest.raises(IdentityError, match="there is no authority") as error:
        Vault(tmp_path, "fed").open(DAY)
    assert "gptfl authority init" in error.value.hint
