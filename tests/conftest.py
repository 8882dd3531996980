"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: how long an example takes is not what these tests are about.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
