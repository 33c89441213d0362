"""No compensation: what is off adds nothing (MoEfication)."""

from moefy.routing.base import Compensation


class NoCompensation(Compensation):
    """Adds nothing."""

    adds = False

    def __init__(self, width: int, experts: int, rank: int) -> None:
        super().__init__()
