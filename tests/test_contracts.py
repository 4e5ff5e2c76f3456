"""Every plug-in in the folders keeps its contract; a new file is tested without editing this one."""

import pytest

from foreshock.core import plugins
from foreshock.testing import check_intervention, check_monitor


@pytest.mark.parametrize("name", plugins.names("monitors"))
def test_monitor(name: str) -> None:
    check_monitor(name)


@pytest.mark.parametrize("name", plugins.names("interventions"))
def test_intervention(name: str) -> None:
    check_intervention(name)
