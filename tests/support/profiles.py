"""How much Hypothesis searches: `ci`, which is the default, or `--hypothesis-profile=nightly` or `quick`.

`ci` always uses the same examples, `quick` a fifth of them; `nightly` draws new ones, ten times as many.
"""

from hypothesis import HealthCheck, settings

N_EXAMPLES = 100

# No deadlines: the machine is shared, and a test's time says nothing about its example.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", _COMMON, derandomize=True, max_examples=N_EXAMPLES)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=N_EXAMPLES // 5)
settings.register_profile("nightly", _COMMON, derandomize=False, max_examples=10 * N_EXAMPLES, print_blob=True)
settings.load_profile("ci")


def n_examples(n: int) -> int:
    """Return the examples of a test that takes n in the profile `ci`."""
    return n * settings.default.max_examples // N_EXAMPLES
