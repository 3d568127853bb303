from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx2
import pytest
from intruders import (
    ADAPTERS,
    ATTACKS,
    AUTHENTICATION,
    DASHBOARD,
    ENROLMENT,
    MALFORMED,
    OTHERS_LEASES,
    OVERSIZED,
    TRAVERSAL,
    Attack,
    attempt,
    count,
    send,
)
from served import DASHBOARD_KEY, KEYS, TOKENS, served

from emutune.fleet.security import self_made_certificate, trusting
from emutune.fleet.server.app import serve

GROUPS = {
    "authentication": AUTHENTICATION,
    "dashboard": DASHBOARD,
    "leases": OTHERS_LEASES,
    "enrolment": ENROLMENT,
    "malformed": MALFORMED,
    "oversized": OVERSIZED,
    "adapters": ADAPTERS,
    "traversal": TRAVERSAL,
}


@pytest.mark.parametrize("group", GROUPS)
def test_nobody_is_let_in(group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(tmp_path) as fleet:
        for attack in GROUPS[group]:
            caplog.clear()
            outcome = asyncio.run(attempt(fleet, attack))
            assert outcome.refused, f"{attack.name}: {outcome.status} {outcome.text[:200]}"
            assert outcome.noted, f"{attack.name}: no row in the ledger"
            assert outcome.unchanged, f"{attack.name}: something changed"
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert warnings, f"{attack.name}: not logged"
            said = outcome.text + caplog.text + "".join(row.detail for row in fleet.ledger.audit_rows())
            for secret in (DASHBOARD_KEY, *KEYS.values(), *TOKENS.values()):
                assert secret not in said, f"{attack.name}: a secret was repeated"
            assert "\n" not in fleet.ledger.audit_rows()[-1].detail


def test_names_of_attacks_are_unique() -> None:
    names = [(attack.name, attack.path) for attack in ATTACKS]
    assert len(set(names)) == len(names)


def test_count_for_a_benchmark(tmp_path: Path) -> None:
    some = ATTACKS[::10]
    assert asyncio.run(count(tmp_path / "fleet", some)) == {"tried": len(some), "let_in": 0, "not_noted": 0}


def test_nobody_is_let_in_over_tls(tmp_path: Path) -> None:
    """The same where a real HTTP parser stands before the application."""
    tls = self_made_certificate(tmp_path / "tls", [])
    # Bytes that no HTTP library sends are left to the parser, which closes the connection.
    attacks = [attack for attack in ATTACKS if attack not in AUTHENTICATION]

    async def run() -> list[tuple[Attack, int]]:
        with served(tmp_path) as fleet:
            before = fleet.state()
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            wrong = []
            context = trusting(tls.authority)
            async with httpx2.AsyncClient(
                verify=context, base_url=f"https://127.0.0.1:{server.port}"
            ) as client:
                for attack in attacks:
                    key = KEYS.get(attack.device or "", attack.key)
                    client.headers = httpx2.Headers({} if key is None else {"Authorization": f"Bearer {key}"})
                    status, _ = await send(client, attack)
                    if status not in attack.statuses:
                        wrong.append((attack, status))
            await server.stop()
            assert fleet.state() == before
            return wrong

    assert asyncio.run(run()) == []
