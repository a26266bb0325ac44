"""Leases: counted, refused by name, and waited for."""

import threading
from pathlib import Path

import pytest

from ninerank.predictor.engine import Engine
from ninerank.predictor.host import NoAdminError, Served, SingleModel, UnknownModelError
from ninerank.predictor.service import RankService
from ninerank.predictor.telemetry import Telemetry


@pytest.fixture(scope="module")
def service(bundle_dir: Path) -> RankService:
    engine = Engine.load(bundle_dir, "cpu")
    return RankService(engine, Telemetry())


def test_one_bundle_is_leased_by_its_name_version_or_neither(service: RankService) -> None:
    host = SingleModel(service)
    for name, version in (("", ""), ("small", ""), ("", "7"), ("small", "7")):
        with host.lease(name, version) as leased:
            assert leased is service
    with pytest.raises(UnknownModelError, match="model 'large' is not served here; served: small"):
        host.lease("large", "")
    with pytest.raises(UnknownModelError, match="version '8' is not served here; served: 7"):
        host.lease("", "8")
    with pytest.raises(NoAdminError):
        host.load("small", "8")
    with pytest.raises(NoAdminError):
        host.unload("small", "7")


def test_a_version_drains_when_the_last_lease_ends(service: RankService) -> None:
    served = Served(service)
    with served, served:
        assert served.state().leases == 2
        assert not served.drained(0.01)
        assert served.state().state == "DRAINING"
    assert served.drained(0)
    with pytest.raises(ZeroDivisionError), served:
        raise ZeroDivisionError
    outcome: list[bool] = []
    with served:
        waiting = threading.Thread(target=lambda: outcome.append(served.drained(60)))
        waiting.start()
    waiting.join(60)
    assert outcome == [True]
