"""Certificates that end soon are told of before they do."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hospital import Hospital, pem

from gptfl_dist.security.authority import Authority
from gptfl_dist.security.expiry import ending
from gptfl_dist.security.vault import Vault

DAY = timedelta(days=1)


def later(monkeypatch, time: timedelta) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + time

    monkeypatch.setattr("gptfl_dist.security.expiry.datetime", Clock)


@pytest.mark.parametrize(
    ("days", "told"),
    [
        (0, []),
        (669, []),
        (671, ["the issuing certificate ends in 5"]),
        (731, ["the issuing certificate ended 1"]),
        (3600, ["the issuing certificate ended", "the root certificate ends in"]),
    ],
)
def test_an_authoritys_own_certificates_are_told_of_sixty_days_before(monkeypatch, tmp_path, days, told):
    vault = Vault(tmp_path / "authority", "fed")
    vault.create()
    later(monkeypatch, days * DAY)
    found = vault.warnings()
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))
    assert all("gptfl authority rotate" in line for line in found)


@pytest.mark.parametrize(
    ("age", "left", "told"), [(0, 40, True), (0, 59, True), (50, 40, True), (0, 61, False), (400, 61, False)]
)
def test_an_issuing_certificate_of_somebody_elses_authority_is_told_of_sixty_days_before_however_short_its_life(
    tmp_path, age, left, told
):
    vault, hospital = Vault(tmp_path / "authority", "fed"), Hospital()
    signed = hospital.sign(vault.request_issuing().read_bytes(), valid=left * DAY, age=age * DAY)
    for name, content in (("chain", signed), ("root", pem(hospital.root))):
        (tmp_path / name).write_bytes(content)
    vault.install_issuing(tmp_path / "chain", tmp_path / "root")
    of_a_silo = ending(vault.open(7 * DAY).issue_silo("alice"), renewed=True)
    for found in (vault.warnings(), of_a_silo):
        assert [line.startswith("the issuing certificate ends in ") for line in found] == [True] * told


@pytest.mark.parametrize(
    ("life", "passed", "renewed", "told"),
    [
        (7 * DAY, 5 * DAY, True, False),  # renewal is under way, and has a day left
        (7 * DAY, 6 * DAY, True, True),
        (DAY / 24, DAY / 48, True, False),
        (DAY / 24, DAY / 25, True, True),
        (90 * DAY, 82 * DAY, False, False),
        (90 * DAY, 84 * DAY, False, True),
        (DAY, timedelta(0), False, True),  # nobody renews it
    ],
)
def test_a_sides_own_certificate_is_told_of_when_it_should_have_been_renewed(monkeypatch, life, passed, renewed, told):
    credentials = Authority.new("fed", valid=life).issue_silo("alice")
    later(monkeypatch, passed)
    found = ending(credentials, renewed=renewed)
    assert [line.startswith("the certificate ends in ") for line in found] == [True] * told
