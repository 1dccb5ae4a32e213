"""The backends: one interface (`base`), the implementations, and the choice of the one that runs (`select`)."""

from .select import NAMES, BackendStatus, BackendUnavailableError, backends, choose

__all__ = ["NAMES", "BackendStatus", "BackendUnavailableError", "backends", "choose"]
