"""Suites of tests, for pytest, that every strategy and every host must pass: ours and yours.

Subclass a suite, and name what it tests:

    from deq_phantom_plugin.testing import StrategySuite

    class TestMine(StrategySuite):
        spec = "mine(k=3)"

To take out a test that does not apply, set its name to None, with the reason in a comment:
`test_inside_autocast = None`.
"""

from .._plumbing.extras import require

# pytest then shows the values in an assertion of a suite that fails.
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
