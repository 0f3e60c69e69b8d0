"""What a stage tells the caller: its manifest and whether it had to run."""

from __future__ import annotations

from typing import NamedTuple

from medsae_ray.run import Manifest


class Outcome(NamedTuple):
    """A finished stage."""

    manifest: Manifest
    ran: bool

    def line(self) -> str:
        """One line for the console."""
        m = self.manifest
        how = f"{m.seconds:.0f} s" if self.ran else "up to date"
        bad = f", {m.quarantined:,} quarantined" if m.quarantined else ""
        return f"{m.stage:<12} {m.rows_out:>9,} rows{bad}, {how}"
