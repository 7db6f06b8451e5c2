"""The README's examples share circuits, so that tests of them start couriers."""

from couriers import impatient_clients, pytest_runtest_teardown  # noqa: F401
