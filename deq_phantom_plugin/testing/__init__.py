"""Suites that every strategy and every host must pass, ours and yours, with pytest.

    from deq_phantom_plugin.testing import StrategySuite

    class TestMine(StrategySuite):
        spec = "mine(k=3)"

What does not apply is taken out by name, with the reason: `test_autocast = None`.
"""

from .._plumbing.extras import require

# Rewritten, an assertion that fails says with which numbers.
require("pytest", "testing").register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("equilibria", "host_case", "hosts", "strategies"))
)

from .contraction import NESTINGS, Contraction, make_equilibrium  # noqa: E402
from .equilibria import EquilibriumSuite  # noqa: E402
from .host_case import HostCase  # noqa: E402
from .hosts import HostSuite  # noqa: E402
from .strategies import StrategySuite  # noqa: E402

__all__ = [
    "NESTINGS",
    "Contraction",
    "EquilibriumSuite",
    "HostCase",
    "HostSuite",
    "StrategySuite",
    "make_equilibrium",
]
