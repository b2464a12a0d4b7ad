"""Errors a user can act on: each message is one sentence with what, expected and remedy.

The command line prints the sentence and exits with `exit_code`; the Python API raises it.
"""

from __future__ import annotations


class CacheplanError(Exception):
    """Base of all errors that are not bugs."""

    exit_code = 1


class InputError(CacheplanError):
    """A file, prompt, option or name given by the user cannot be used as given."""

    exit_code = 2


class PlanError(CacheplanError):
    """A plan file is malformed, edited, contradictory or of an unknown version."""

    exit_code = 3


class ProfileError(CacheplanError):
    """A profile file is malformed, incomplete, holds NaN, or lacks what was asked for."""

    exit_code = 3


class ModelMismatchError(CacheplanError):
    """A plan or profile was made for another model than the one at hand."""

    exit_code = 4


class UnsupportedError(CacheplanError):
    """The model or the way it is called is outside what the runtime does correctly."""

    exit_code = 5


class InfeasibleError(CacheplanError):
    """No plan fits the budget; the message names the smallest feasible one."""

    exit_code = 6
