"""The layer under its public name, a subclass."""

from deltamem.core.delta_impl import DeltaMemAttention as Base


class DeltaMemAttention(Base):
    """It inherits all that patch() replaces."""
