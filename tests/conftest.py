"""Property tests here draw the same examples on every machine and are not timed."""

from hypothesis import settings

settings.register_profile("dmoe", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("dmoe")
