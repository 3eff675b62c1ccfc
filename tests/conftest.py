"""What holds for every test."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _the_package_may_log():
    """The benchmarks silence the package's logger for a whole process; tests of what is logged must not depend on their order."""
    logging.getLogger("trl_sharelora").setLevel(logging.NOTSET)
