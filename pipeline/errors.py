"""The four ways a run can be refused, one exit code each.

Every message names what failed, the offending value, the rule and the remedy. Anything that is
not one of these is a defect of ours and keeps its traceback.
"""

from functools import partial
from typing import Any


class PipelineError(Exception):
    """A refusal that the user can act on.

    Args:
        what: what failed, in one sentence.
        value: the offending value, if there is one.
        rule: what is allowed.
        remedy: what to do, as a command where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, rule: str, remedy: str, value: object = None) -> None:
        self.what, self.value, self.rule, self.remedy = what, value, rule, remedy
        rows = [("value", value), ("rule", rule), ("remedy", remedy)]
        shown = [f"  {name + ':':<8}{text}" for name, text in rows if text is not None]
        super().__init__("\n".join([what, *shown]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Launchers carry a refusal from the process that met it to the one that reports it."""
        again = partial(type(self), self.what, rule=self.rule, remedy=self.remedy)
        return partial(again, value=self.value), ()


class ConfigError(PipelineError):
    """The configuration breaks a rule."""

    exit_code = 2


class InputError(PipelineError):
    """The model or the data cannot be used."""

    exit_code = 3


class ResourceError(PipelineError):
    """Disk, memory, a lock or a permission is missing."""

    exit_code = 4


class ArtifactError(PipelineError):
    """An artefact is corrupt, incomplete, or belongs to another configuration."""

    exit_code = 5
