"""Many recipes on one model, under equal terms: the same captures, the same evaluation documents.

    bench = Comparison("path/to/model", folder="work")
    row = bench.run(recipe)          # KL, cross-entropy increase, bits read, seconds

The model is moefied in memory. Captures are made once per sample size, partitions once per method
and expert size, and kept in `folder`. Recipes that name a baseline (TEAL, WINA) run as that.

Shapes: B documents, T tokens, V vocabulary, D width.
"""

import tempfile
import time
from bisect import bisect_right
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.benchmark.roundings import AS_IS, ROUNDINGS, Dense, Rounding, file_bits
from moefy.conversion.in_memory import in_memory, measure
from moefy.conversion.plan import plan, router_of
from moefy.conversion.task import Conversion
from moefy.data.corpus import Batch, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import CONTEXT, EVALUATED_DOCUMENTS, by_role
from moefy.errors import MoefyError, RecipeError
from moefy.evaluation.evaluate import figures_of
from moefy.evaluation.outputs import Figures, Outputs, judge, run_outputs
from moefy.evaluation.routing import FfnLoad, bits_read
from moefy.experts.entries import build_compensation, build_router
from moefy.experts.loading import load_dense, replace_module
from moefy.experts.passes import observing
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.methods.base import WIDE_BITS
from moefy.methods.input_sparsity import InputSparseMlp
from moefy.methods.routers.baselines import OracleRouter
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import read_mlp, side_of, sites
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import unfilled
from moefy.recipe import Recipe
from moefy.run.console import Reporter
from moefy.run.output import Stages


class Comparison:
    """One model and one seed; `seed` draws the shards and everything that a recipe draws."""

    def __init__(
        self,
        model: str | Path,
        folder: str | Path,
        *,
        corpus: Any = None,
        seed: int = 0,
        documents: int = EVALUATED_DOCUMENTS,
        report: Reporter | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.open(model)
        read_config(self.checkpoint)  # what no recipe can convert is refused here, not in every row
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seed, self.report = seed, report or Reporter(quiet=True)
        self.text = load_corpus(corpus)
        self.corpus = {"name": self.text.name, "sha256": self.text.sha256}
        self.documents = documents
        self._dense_outputs: list[Outputs] = []
        self._evaluation: list[Batch] = []

    @property
    def decided(self) -> list[Any]:
        """What decides every figure beside the recipe, as JSON values."""
        return [self.checkpoint.all_hashes(), self.corpus, self.documents, self.seed]

    def run(self, recipe: Recipe, rounding: Rounding = AS_IS) -> dict[str, Any]:
        """Convert in memory, evaluate; a JSON record. Raises what `plan` raises.

        A recipe that names a baseline may run on weights that are rounded.
        """
        recipe = replace(recipe, seed=self.seed)
        began = time.perf_counter()
        if recipe.baseline is None:
            model, fitted = self._moefied(recipe)
        else:
            model, fitted = self._baseline(recipe, rounding), {}
        seconds = time.perf_counter() - began
        return {
            "seed": self.seed,
            "settings": recipes.to_dict(recipe),
            **self.quality(model),
            **fitted,
            "seconds": round(seconds, 2),
        }

    def dense_nats(self) -> float:
        """Cross-entropy of the dense language model on the evaluation documents."""
        dense = self._dense()
        return judge(dense, self._evaluation).mean("ce")

    def rounded(self, name: str) -> dict[str, Any]:
        """The dense model with its MLPs rounded as the row `name` of `ROUNDINGS`; `n/a` says why not.

        Where llama.cpp makes a file, `whole_bits` are those of all its tensors.
        """
        began = time.perf_counter()
        rounding, recipe = ROUNDINGS[name], Recipe(seed=self.seed)
        try:
            row = self.quality(self._baseline(recipe, rounding))
            if rounding.file is not None:
                row["whole_bits"] = file_bits(rounding.file(self._source(self._task(recipe))))
        except MoefyError as error:
            return {"n/a": str(error)}
        return {"seed": self.seed, **row, "seconds": round(time.perf_counter() - began, 2)}

    def at(self, recipe: Recipe, budget: float, rounding: Rounding = AS_IS) -> dict[str, Any]:
        """`run` at the density that reads this budget; `n/a` says why there is none.

        A budget above 1 is bits per MLP weight of the dense model, another one a share of its 16.
        """
        try:
            density = self.density_at(recipe, budget, rounding)
            if density is None:
                return {"n/a": "cannot go below this budget"}
            return self.run(recipes.override(recipe, {"density": density}), rounding)
        except MoefyError as error:
            return {"n/a": str(error)}

    def oracle(self, density: float) -> dict[str, Any]:
        """Single neurons chosen by their true contribution, the same number for every token.

        A bound, not a method: what choosing takes is not counted, so its budget is its density.
        """
        single = recipes.from_dict(
            {
                "density": density,
                "partition": {"expert_size": 1},
                "router": {"name": "random"},
                "compensation": {"name": "none"},
            }
        )
        model, _ = self._moefied(replace(single, seed=self.seed))
        for module in sparse_mlps(model).values():
            module.router = OracleRouter(module.weights.width, module.experts)
        return {"seed": self.seed, **self.quality(model), "seconds": 0.0}

    def neurons(self) -> int:
        """Neurons of the first MLP."""
        return plan(self.checkpoint, Recipe(), self.text.name).sites[0].neurons

    def density_at(self, recipe: Recipe, budget: float, rounding: Rounding = AS_IS) -> float | None:
        """The FFN density at which a recipe reads a budget (as in `at`); None below its least.

        What runs is whole experts, so the budget that is reached may be a little smaller.
        """
        bits = budget if budget > 1 else WIDE_BITS * budget
        if recipe.baseline is not None:
            task = self._task(replace(recipe, baseline=None))
            _, stored = next(rounding.make(self._source(task)))
            return min(1.0, bits / stored)
        todo = plan(self.checkpoint, replace(recipe, density=1.0), self.text.name)
        site, entry = todo.sites[0], todo.layers[0]
        if recipe.selection.name == "prompt_static":
            # The prompt, half of every document, runs densely.
            bits = 2 * bits - WIDE_BITS
        mlp = DenseMlp(
            up_ND=torch.empty(site.neurons, site.width, device="meta"),
            down_ND=torch.empty(site.neurons, site.width, device="meta"),
            gate_ND=torch.empty(site.neurons, site.width, device="meta") if site.gated else None,
            activation=site.activation,
            stored=unfilled(site.neurons, site.width, site.gated, **entry.storage)
            if entry.storage
            else None,
        )
        weights = mlp.matrices * site.neurons * site.width
        compensation = build_compensation(entry)

        def bits_at(active: float) -> float:
            density = active / entry.experts
            settings = {**entry.router, **router_of(site, recipe, density)}
            router = build_router(replace(entry, router=settings))
            read = bits_read(
                mlp, router, compensation, density, experts=entry.experts, shared=entry.shared
            )
            return read / weights

        # The most experts within the budget; what runs is whole ones, and .15 of one is forgiven.
        active = bisect_right(
            range(entry.shared + 1, entry.experts + 1), bits, key=lambda n: bits_at(n - 0.15)
        )
        return (entry.shared + active) / entry.experts if active else None

    @torch.no_grad()
    def quality(self, model: PreTrainedModel) -> dict[str, Any]:
        """KL and cross-entropy increase (or cosine) and what was read, on the evaluation shard."""
        load = FfnLoad(model) if sparse_mlps(model) else None
        baselines = [m for m in model.modules() if isinstance(m, InputSparseMlp)]

        def run(batch: Batch) -> Outputs:
            if load is None:
                for module in baselines:
                    module.counted = batch.mask(module.side)
                return run_outputs(model, batch)
            with observing(model, batch, load):
                return run_outputs(model, batch)

        dense = self._dense()
        judgement = judge(run, self._evaluation, dense, partial(_shown, figures_of(model)))
        found: dict[str, Any] = {name: judgement.mean(name) for name in judgement.sums_Q}
        if load is not None:
            found["ffn_density"] = load.density()
            found["bits_read"] = load.bits_read()
            found["active_budget"] = load.active_budget()
            found["active_compute"] = load.active_compute()
            found["density_by_layer"] = load.per_layer()
        else:
            found["active_compute"] = sum(m.active_budget() for m in baselines) / len(baselines)
            found["bits_read"] = sum(m.bits_read() for m in baselines) / len(baselines)
            found["active_budget"] = found["bits_read"] / WIDE_BITS
        return {"tokens": int(judgement.tokens_Q.sum()), **found}

    def _moefied(self, recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Any]]:
        if recipe.attention.density is not None:
            raise RecipeError(
                "attention.density: recipes are compared by what their MLPs read; leave it out here "
                "and use moefy convert and moefy eval"
            )
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            model, made = in_memory(self._task(recipe, Path(work)))
        fits = [{k: v for k, v in fit.items() if k != "layer"} for fit in made.fits]
        return model, {"routers": fits, **({"tuning": made.tuning} if made.tuning else {})}

    def _task(self, recipe: Recipe, work: Path | None = None) -> Conversion:
        """A conversion that takes over what those before it have captured and split."""
        task = Conversion.planned(
            self.checkpoint, recipe, self.text, work or self.folder, report=self.report,
            captures=self.folder / f"seed{self.seed}", partitions=Stages(self.folder),
        )  # fmt: skip
        # Any recipe distils on all that routers could be fitted on.
        text = by_role(self.text, self.seed)["router"]
        read = partial(read_batches, self.checkpoint, task.todo.kind, text, recipe.context)
        return replace(task, distilled_on=read() if recipe.distil.steps else [])

    def _baseline(self, recipe: Recipe, rounding: Rounding = AS_IS) -> PreTrainedModel:
        """The dense model, its MLPs rounded and, where the recipe says so, without small inputs."""
        task = self._task(replace(recipe, baseline=None))
        model = task.load()
        dtype = next(model.parameters()).dtype
        mlps = rounding.make(self._source(task))
        for site, (mlp, bits) in zip(task.todo.sites, mlps, strict=True):
            module = InputSparseMlp(
                mlp.contiguous(), recipe.baseline or "teal", side_of(site), bits
            )
            if recipe.baseline is not None:
                sample = measure(task)["partition"]
                module.calibrate(sample.inputs(site).float(), recipe.density)
            # As moefied layers do, all compute in the dtype of the model.
            module.mlp = module.mlp.to(dtype)
            replace_module(model, site, module)
        return model

    def _source(self, task: Conversion) -> Dense:
        """What is rounded."""
        weights = task.weights()
        return Dense(
            checkpoint=self.checkpoint,
            sites=task.todo.sites,
            mlp=lambda site: read_mlp(site, weights).to(torch.float32),
            inputs=lambda site: measure(task)["router"].inputs(site),
            folder=self.folder,
        )

    def _dense(self) -> list[Outputs]:
        if not self._dense_outputs:
            stock = load_dense(self.checkpoint, **placement())
            kind = sites(stock)[0].family.kind
            text = by_role(self.text, self.seed)["evaluation"].take(self.documents)
            self._evaluation = read_batches(self.checkpoint, kind, text, CONTEXT)
            with torch.no_grad():
                self._dense_outputs = [run_outputs(stock, batch) for batch in self._evaluation]
        return self._dense_outputs


def _shown(of: Figures, dense: Outputs, sparse: Outputs) -> dict[str, Tensor]:
    """What recipes are compared by `[J]`."""
    found = of(dense, sparse)
    if "ce" not in found:
        return found
    increase = {"ce_increase": found["ce"] - found["ce_dense"]}
    return {"kl": found["kl"], **increase, "agreement": found["agreement"]}
