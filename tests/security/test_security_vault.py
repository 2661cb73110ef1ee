"""An authority that is kept: its files, its rotation, and an institution's own authority above it."""

from __future__ import annotations

import contextlib
import stat
from datetime import timedelta

import pytest
from cryptography import x509
from hospital import Hospital, pem

from gptfl_dist.errors import IdentityError, ProtocolError, StorageError
from gptfl_dist.files import write_file
from gptfl_dist.security.authority import Credentials, cross_signed, make_root, new_key
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


class Killed(BaseException):
    pass


@contextlib.contextmanager
def stopped_after(monkeypatch, written):
    """The process is killed in the block, once it has written so many files."""
    left = [None] * written

    def write(path, content):
        if not left:
            raise Killed
        left.pop()
        write_file(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("gptfl_dist.security.credentials.write_file", write)
        patched.setattr("gptfl_dist.security.vault.write_file", write)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("written", range(4))
def test_a_rotation_that_was_cut_short_leaves_an_authority_that_works(vault, monkeypatch, written):
    silo = vault.open(DAY).issue_silo("alice")
    with stopped_after(monkeypatch, written):
        vault.rotate()
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


def install(vault: Vault, chain: bytes, roots: bytes) -> None:
    folder = vault.folder.parent
    (folder / "chain.pem").write_bytes(chain)
    (folder / "root.pem").write_bytes(roots)
    vault.install_issuing(folder / "chain.pem", folder / "root.pem")


@pytest.fixture
def below(tmp_path):
    """An authority below a hospital's, and that."""
    hospital, vault = Hospital(), Vault(tmp_path / "authority", "fed")
    assert not vault.exists
    install(vault, hospital.sign(vault.request_issuing().read_bytes()), pem(hospital.root))
    return vault, hospital


def test_an_institutions_own_authority_can_stand_above(below):
    vault, hospital = below
    authority = vault.open(DAY)
    assert meet(authority.issue_coordinator(["localhost"]), authority.issue_silo("alice"))
    assert authority.roots == pem(hospital.root)
    assert vault.request is None


def test_its_issuing_certificate_is_replaced_and_nobody_is_cut_off(below):
    """The old one is used until the new one is there, then sides of both meet; a request that waits is kept."""
    vault, hospital = below
    old = vault.open(DAY)
    request = vault.request_next()
    assert vault.request == request
    asked = x509.load_pem_x509_csr(vault.request_next().read_bytes())
    assert vault.open(DAY).chain == old.chain
    chain = hospital.sign(request.read_bytes())
    assert x509.load_pem_x509_certificate(chain).public_key() == asked.public_key()
    install(vault, chain, pem(hospital.root))
    new = Vault(vault.folder, "fed").open(DAY)
    assert new.chain == chain != old.chain
    for coordinator in (old, new):
        for silo in (old, new):
            assert meet(coordinator.issue_coordinator(["localhost"]), silo.issue_silo("alice"))
    assert vault.request is None
    assert stat.S_IMODE((vault.folder / "issuing.key").stat().st_mode) == 0o600
    with pytest.raises(IdentityError, match="no root was replaced"):  # its root is what it was
        vault.drop_old_root()


def test_a_certificate_that_was_renewed_for_the_same_key_is_taken_too(below):
    vault, hospital = below
    old = vault.open(DAY)
    chain = hospital.sign((vault.folder / "issuing.csr").read_bytes(), valid=5 * DAY)
    install(vault, chain, pem(hospital.root))
    assert vault.open(DAY).chain == chain
    assert meet(vault.open(DAY).issue_coordinator(["localhost"]), old.issue_silo("alice"))


def test_the_old_chain_is_not_installed_while_a_request_for_the_next_one_waits(below):
    vault, hospital = below
    old = vault.open(DAY)
    request = vault.request_next()
    with pytest.raises(
        IdentityError, match=r"is for the issuing key in use, and .*csr asks for a certificate"
    ) as error:
        install(vault, old.chain, pem(hospital.root))
    assert f"have {request} signed" in error.value.hint
    assert vault.open(DAY).chain == old.chain
    chain = hospital.sign(request.read_bytes())  # whose key is still there
    install(vault, chain, pem(hospital.root))
    assert vault.open(DAY).chain == chain


def test_a_new_root_above_it_comes_by_a_bridge_from_the_old_one(below):
    vault, hospital = below
    old_silo = vault.open(DAY).issue_silo("alice")
    successor = Hospital()
    chain = successor.sign(vault.request_next().read_bytes())
    with pytest.raises(IdentityError, match="leads to none of the roots that silos trust today") as error:
        install(vault, chain, pem(successor.root))
    assert "that the old root signed" in error.value.hint
    bridge = cross_signed(pem(successor.root), hospital.root, hospital.key)
    install(vault, chain + bridge, pem(successor.root))
    new = vault.open(DAY)
    assert vault.roots() == [successor.root, hospital.root]
    assert meet(new.issue_coordinator(["localhost"]), old_silo)
    assert meet(new.issue_coordinator(["localhost"]), new.issue_silo("alice"))
    vault.drop_old_root()
    last = vault.open(DAY)
    assert (last.chain, last.roots) == (chain, pem(successor.root))
    assert meet(last.issue_coordinator(["localhost"]), new.issue_silo("alice"))
    assert not meet(last.issue_coordinator(["localhost"]), old_silo)


@pytest.mark.parametrize("written", range(3))
def test_an_installation_that_was_cut_short_leaves_an_authority_that_works(below, monkeypatch, written):
    vault, hospital = below
    silo = vault.open(DAY).issue_silo("alice")
    chain = hospital.sign(vault.request_next().read_bytes())
    with stopped_after(monkeypatch, written):
        install(vault, chain, pem(hospital.root))
    assert meet(vault.open(DAY).issue_coordinator(["localhost"]), silo)
    install(vault, chain, pem(hospital.root))
    assert vault.open(DAY).chain == chain
    assert meet(vault.open(DAY).issue_coordinator(["localhost"]), silo)


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        (lambda hospital, request: hospital.sign(request, ca=False), "may not sign certificates"),
        (lambda hospital, request: hospital.sign(request, ca=None), "may not sign certificates"),
        (lambda hospital, request: Hospital().sign(request), "was not issued by"),
        (lambda hospital, request: make_root("fed", new_key()), "is no certificate for"),
        (lambda hospital, request: hospital.sign(request, valid=-DAY / 2), "12 h too late"),
    ],
)
def test_what_is_no_issuing_certificate_of_ours_is_not_installed(tmp_path, certificate, said):
    vault, hospital = Vault(tmp_path / "authority", "fed"), Hospital()
    request = vault.request_issuing().read_bytes()
    with pytest.raises(IdentityError, match=said):
        install(vault, certificate(hospital, request), pem(hospital.root))
    assert not vault.exists


def test_no_certificate_outlives_the_one_that_signed_it(tmp_path):
    vault, hospital = Vault(tmp_path / "authority", "fed"), Hospital()
    install(vault, hospital.sign(vault.request_issuing().read_bytes(), valid=DAY / 2), pem(hospital.root))
    made = x509.load_pem_x509_certificate(vault.open(7 * DAY).issue_silo("alice").certificate)
    assert made.not_valid_after_utc <= vault.issuing().not_valid_after_utc
    install(vault, hospital.sign(vault.request_next().read_bytes(), valid=DAY / 1441), pem(hospital.root))
    with pytest.raises(IdentityError, match="signs no more") as error:
        vault.open(7 * DAY).issue_silo("alice")
    assert "gptfl authority rotate" in error.value.hint


def test_where_there_is_none_it_says_how_to_make_one(tmp_path):
    with pytest.raises(IdentityError, match="there is no authority") as error:
        Vault(tmp_path, "fed").open(DAY)
    assert "gptfl authority init" in error.value.hint
