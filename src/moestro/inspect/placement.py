"""What a run's routing says about where its experts should be: each placement policy, tried on its history."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moestro.inspect.history import histories
from moestro.inspect.runfolder import read_run
from moestro.parallel import POLICIES, Cluster, Gain, policy_gains


@dataclass(frozen=True)
class RunPlacements:
    """What every policy would have done for every layer of a run.

    Attributes:
        cluster: ranks and slots.
        steps: the first and the last step of the part on which policies are measured.
        layers: gains by layer label, in model order.
    """

    cluster: Cluster
    steps: tuple[int, int]
    layers: dict[str, list[Gain]]

    def summary(self) -> list[dict[str, object]]:
        """One row per policy, over all layers: means, and the speed-up of all layers together."""
        rows: list[dict[str, object]] = []
        for gains in zip(*self.layers.values(), strict=True):
            count, busiest = len(gains), sum(gain.busiest for gain in gains)
            rows.append(
                {
                    "policy": gains[0].policy,
                    "balancedness": sum(gain.balancedness for gain in gains) / count,
                    "hindsight": sum(gain.hindsight for gain in gains) / count,
                    "speedup": sum(gain.busiest * gain.speedup for gain in gains) / busiest,
                    "moved": sum(gain.moved for gain in gains),
                    "slots": len(gains[0].placement.expert_of_slot),
                }
            )
        return rows

    def plain(self) -> dict[str, object]:
        """Everything as plain values, for JSON."""
        return {"cluster": asdict(self.cluster), "steps": self.steps, "policies": self.summary()} | {
            "layers": {label: [asdict(gain) for gain in gains] for label, gains in self.layers.items()}
        }


def run_placements(
    run: Path,
    cluster: Cluster,
    *,
    predictor: str = "sliding-average",
    decide_at: float = 0.5,
    policies: Iterable[str] | None = None,
) -> RunPlacements:
    """Try placement policies on the loads that a run recorded; see `moestro.parallel.policy_gains`.

    Args:
        run: folder of a run.
        cluster: ranks and slots.
        predictor: of the loads to come.
        decide_at: share of the records after which the placements are decided.
        policies: names; None = all.

    Raises:
        ValueError: a folder without routing records, sizes that do not fit, or unknown names.
    """
    layers = histories(read_run(run).routing)
    if not layers:
        raise ValueError(f"{run} has no routing records; train a mixture of experts with a smaller train.log_every")
    names = list(POLICIES if policies is None else policies)
    found = {
        layer.label: policy_gains(layer.loads, cluster, predictor=predictor, decide_at=decide_at, policies=names)
        for layer in layers
    }
    split = round(len(layers[0].steps) * decide_at)
    return RunPlacements(cluster, (layers[0].steps[split], layers[0].steps[-1]), found)
