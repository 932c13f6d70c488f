"""The recipe of SmolLM3-3B in configs/smollm3_3b adds up to the published figures.

Also the same three stages at laptop scale: what their files hold, and what they plan.
"""

from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol.cli import main
from smol.config import load_config
from smol.data.loader import Layout
from smol.data.stages import Segment, StageConfig, plan
from smol.lightning_cli import SmolCLI
from smol.model import Decoder, DecoderConfig, num_parameters
from smol.optim.groups import parameter_groups
from smol.parallel.tensor_parallel import check_divisible
from smol.paths import project_root

CONFIGS = project_root() / "configs"
STAGES = ("stage1", "stage2", "stage3")
LONG_CONTEXT = ("long_context_32k", "long_context_64k")
PHASES = (*STAGES, *LONG_CONTEXT)
GLOBAL_BATCH = 2_359_296

# Per cent of the normalised weights of the published files, in the order of PHASES.
SHARES = {
    "web-en": (72.40, 64.70, 50.34, 39.96, 40.41),
    "web-multi": (12.00, 11.70, 13.13, 11.82, 11.02),
    "stackexchange": (0.40, 0.20, 0.10, 0.09, 0.09),
    "code": (12.50, 14.32, 23.20, 22.68, 19.82),
    "math": (2.70, 9.08, 11.44, 12.09, 9.30),
    "math-QA": (0.00, 0.00, 1.65, 3.22, 4.22),
    "code-QA": (0.00, 0.00, 0.05, 0.04, 0.04),
    "reasoning-QA": (0.00, 0.00, 0.10, 0.09, 0.09),
    "long-reasoning": (0.00, 0.00, 0.00, 10.00, 9.00),
    "instruct-QA": (0.00, 0.00, 0.00, 0.00, 6.00),
}
TOTALS = {
    "web": (("web-en", "web-multi"), (84.4, 76.4, 63.5, 51.8, 51.4)),
    "code": (("code", "stackexchange", "code-QA"), (12.9, 14.5, 23.3, 22.8, 20.0)),
    "maths": (("math", "math-QA"), (2.7, 9.1, 13.1, 15.3, 13.5)),
}


@cache
def build(phase: str) -> SmolCLI:
    """Build a phase on one CPU process; the decoder itself is made only when a run starts."""
    file = CONFIGS / "smollm3_3b" / f"{phase}.yaml"
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    return main(["fit", "--config", str(file), *here], run=False)


@cache
def written(phase: str) -> dict[str, Any]:
    return load_config([CONFIGS / "smollm3_3b" / f"{phase}.yaml"])


def mixture(phase: str) -> dict[str, dict[str, Any]]:
    return written(phase)["data"]["init_args"]["stages"][phase]["mixture"]


def share(phase: str, *domains: str) -> float:
    """Per cent of a phase's tokens that come from sources of these domains."""
    weights: Counter[str] = Counter()
    for source in mixture(phase).values():
        weights[source["provenance"].partition(":")[0]] += source["weight"]
    return 100 * sum(weights[domain] for domain in domains) / sum(weights.values())


def planned(stages: dict[str, StageConfig], context: int, batch: int) -> list[Segment]:
    digests = {name: f"digest of {name}" for s in stages.values() for name in s.sources}
    return plan(stages, digests, context, batch)


def segments(phase: str) -> list[Segment]:
    data = build(phase).datamodule
    return planned(data.stages, data.context_length, data.global_batch_tokens)


class TestPublishedRecipe:
    def test_model_has_the_published_number_of_parameters(self) -> None:
        for phase in PHASES:
            assert num_parameters(build(phase).model.decoder_config) == 3_075_098_624
        nope = build("stage1").model.decoder_config.nope_layers
        assert nope == {3, 7, 11, 15, 19, 23, 27, 31, 35}

    @pytest.mark.parametrize(
        ("phase", "start_step", "stop_step", "tokens"),
        [
            ("stage1", 0, 3_450_000, 8.140e12),
            ("stage2", 3_450_000, 4_198_000, 1.765e12),
            ("stage3", 4_198_000, 4_720_000, 1.232e12),
            ("long_context_32k", 0, 20_000, 47.2e9),
            ("long_context_64k", 0, 22_000, 51.9e9),
        ],
    )
    def test_steps_and_tokens(
        self, phase: str, start_step: int, stop_step: int, tokens: float
    ) -> None:
        last = segments(phase)[-1]
        assert last.stage == phase
        assert last.start_step == start_step
        assert build(phase).trainer.max_steps == stop_step
        trained = (stop_step - last.start_step) * last.global_batch
        assert trained == pytest.approx(tokens, rel=0.001)

    def test_three_stages_adjoin_and_make_up_11_136_trillion_tokens(self) -> None:
        run = segments("stage3")
        assert [segment.stage for segment in run] == list(STAGES)
        assert all(a.stop == b.start for a, b in pairwise(run))
        end = run[-1].start + (4_720_000 - run[-1].start_step) * run[-1].global_batch
        assert end == pytest.approx(11.136e12, rel=0.0001)

    @pytest.mark.parametrize(
        ("phase", "context", "rows", "passes", "groups"),
        [
            ("stage1", 4096, 3, 1, 192),
            ("stage2", 4096, 3, 1, 192),
            ("stage3", 4096, 3, 1, 192),
            ("long_context_32k", 32_768, 1, 6, 12),
            ("long_context_64k", 65_536, 1, 3, 12),
        ],
    )
    def test_global_batch(
        self, phase: str, context: int, rows: int, passes: int, groups: int
    ) -> None:
        data, trainer = build(phase).datamodule, written(phase)["trainer"]
        for segment in segments(phase):
            assert segment.context == context
            assert segment.global_batch == GLOBAL_BATCH == rows * passes * groups * context
            assert Layout(0, groups, data.micro_batch_tokens).rows(segment) == rows
            assert Layout(0, groups, data.micro_batch_tokens).accumulation(segment) == passes
        sizes = trainer["strategy"]["init_args"]
        assert trainer["num_nodes"] * trainer["devices"] == groups * sizes["tensor_parallel_size"]

    def test_two_gpus_compute_each_block_and_nothing_else_is_split(self) -> None:
        for phase in PHASES:
            sizes = written(phase)["trainer"]["strategy"]["init_args"]
            assert sizes == {"tensor_parallel_size": 2, "shard_size": 1}
            check_divisible(
                build(phase).model.decoder_config, build(phase).datamodule.context_length, 2
            )

    def test_activations_are_computed_again_in_the_last_phase_only(self) -> None:
        kinds = [build(phase).model.activation_checkpointing for phase in PHASES]
        assert kinds == ["none"] * 4 + ["full"]

    def test_number_of_sources(self) -> None:
        assert [len(mixture(phase)) for phase in PHASES] == [41, 46, 56, 56, 57]

    def test_weights_are_kept_as_written(self) -> None:
        sums = [sum(source["weight"] for source in mixture(phase).values()) for phase in PHASES]
        assert sums[:3] == pytest.approx([1.0, 1.00005, 1.00565], abs=1e-9)
        assert sums[3:] == pytest.approx([1.0, 1.0], abs=5e-5)  # rounded to 5 decimals each

    @pytest.mark.parametrize(("index", "phase"), enumerate(PHASES))
    def test_domain_shares(self, index: int, phase: str) -> None:
        assert share(phase, *SHARES) == pytest.approx(100)
        for domain, expected in SHARES.items():
            assert share(phase, domain) == pytest.approx(expected[index], abs=0.1), domain
        for total, (domains, expected) in TOTALS.items():
            assert share(phase, *domains) == pytest.approx(expected[index], abs=0.1), total

    def test_what_is_known_of_single_sources(self) -> None:
        def weights(name: str) -> list[float]:
            return [mixture(phase).get(name, {"weight": 0})["weight"] for phase in PHASES]

        assert weights("fw2-vie")[:3] == [0.00325, 0.00005, 0.00005]  # cut, read too often
        assert weights("finemath-3plus")[0] == 0.017
        assert weights("infiwebmath-3plus")[0] == 0.010
        assert weights("jupyter-scripts")[4] == 0
        assert [bool(weight) for weight in weights("fw2-fas")] == [True, True, True, False, False]
        assert [bool(weight) for weight in weights("fw2-arb")] == [False, False, False, True, True]
        assert weights("long-reasoning")[3:] == [0.09, 0.08]
        assert weights("long-reasoning-chatml")[3:] == [0.01, 0.01]
        assert weights("Wiki_MCQ_final_14M")[4] == 0.04
        assert weights("code_sft_tulu_nemotron_180k")[4] == 0.02

    def test_stage_2_swaps_stack_v2_for_stack_edu(self) -> None:
        def languages(phase: str, collection: str) -> set[str]:
            return {n.removeprefix(collection) for n in mixture(phase) if n.startswith(collection)}

        kept = {"TypeScript", "Swift", "Ruby", "Rust", "Go", "Shell", "HTML"}
        assert languages("stage2", "stack-v2-") == kept
        assert languages("stage2", "stack-edu-") == languages("stage1", "stack-v2-") - kept
        assert len(languages("stage2", "stack-edu-")) == 9
        assert languages("stage3", "stack-edu-") == languages("stage1", "stack-v2-")

    def test_ratio_of_the_two_english_web_sources(self) -> None:
        ratios = []
        for phase in PHASES:
            edu, dclm = (mixture(phase)[name]["weight"] for name in ("fineweb-edu", "dclm"))
            ratios.append(round(100 * edu / (edu + dclm)))
        assert ratios == [47, 48, 40, 32, 38]

    def test_a_source_is_the_same_in_every_phase(self) -> None:
        seen: dict[str, tuple[str, str]] = {}
        for phase in PHASES:
            for name, source in mixture(phase).items():
                assert source["path"] == f"${{vars.data}}/{name}"
                origin = source["path"], source["provenance"]
                assert seen.setdefault(name, origin) == origin

    def test_learning_rate(self) -> None:
        optimizer = build("stage3").model.optimizer_config
        assert optimizer.learning_rate == 2e-4
        steps = (0, 1999, 2000, 4_198_000, 4_459_000, 4_719_999, 4_720_000)
        schedule = build("stage3").model.schedule
        assert [schedule(step) for step in steps] == pytest.approx(
            [1 / 2000, 1, 1, 1, 0.5, 1 / 522_000, 0], rel=1e-9
        )
        assert 100 * schedule.decay_steps / 4_720_000 == pytest.approx(11.06, abs=0.005)
        for phase in ("stage1", "stage2"):  # before the decay, all three agree
            early = build(phase).model.schedule
            assert all(early(s) == schedule(s) for s in (0, 999, 1999, 3_450_000, 4_197_999))

    @pytest.mark.parametrize(
        ("phase", "theta", "steps"),
        [("long_context_32k", 2e6, 20_000), ("long_context_64k", 5e6, 22_000)],
    )
    def test_long_context_schedule(self, phase: str, theta: float, steps: int) -> None:
        model = build(phase).model
        assert model.rope_config.theta == theta
        assert model.optimizer_config.learning_rate == 2e-5
        chosen = (0, 999, 1000, (1000 + steps) // 2, steps)
        assert [model.schedule(step) for step in chosen] == pytest.approx(
            [1 / 1000, 1, 1, 0.5, 0], abs=1e-12
        )

    def test_optimizer_seed_and_clipping(self) -> None:
        for phase in PHASES:
            cli = build(phase)
            optimizer = cli.model.optimizer_config
            assert (*optimizer.betas, optimizer.eps) == (0.9, 0.95, 1e-8)
            assert cli.trainer.gradient_clip_val == 1.0
            assert cli.settings.seed_everything == cli.model.init_seed == cli.datamodule.seed == 6
            assert cli.model.z_loss == 0
            assert cli.datamodule.embedded is None

    def test_only_the_embedding_is_free_of_weight_decay(self) -> None:
        config = build("stage1").model.optimizer_config
        tiny = Decoder(DecoderConfig(16, 8, 1, 2, 1, 16))
        groups = parameter_groups(tiny.named_parameters(), config)
        kept = {g["group"]: [name for name, _ in g["params"]] for g in groups}
        assert kept.pop("embeddings") == ["model.embed_tokens.weight"]
        assert set(kept) == {"default"}
        assert "model.norm.weight" in kept["default"]
        assert config.weight_decay == 0.1

    def test_every_phase_begins_where_the_one_before_ended(self) -> None:
        links = ["continues", "continues", "init_from", "init_from"]
        for (before, after), link in zip(pairwise(PHASES), links, strict=True):
            config = written(after)
            assert {k: config.get(k) for k in ("continues", "init_from")} == {
                "continues": None,
                "init_from": None,
                link: written(before)["name"],
            }
            report = written(before)["callbacks"]["run_report"]["init_args"]
            assert report["next_command"].endswith(f"--config configs/smollm3_3b/{after}.yaml")


class TestLaptopStages:
    def keys(self, file: Path) -> set[str]:
        """Dotted keys that a file itself sets, down to the stages' names."""

        def walk(node: Any, path: tuple[str, ...]) -> set[str]:
            if not isinstance(node, dict) or path[-2:-1] == ("stages",):
                return {".".join(part for part in path if part != "init_args")}
            return set().union(*(walk(value, (*path, key)) for key, value in node.items()))

        return walk(yaml.safe_load(file.read_text()), ())

    def test_files_hold_only_what_differs(self) -> None:
        every = {"extends", "name", "continues", "trainer.max_steps"}
        every |= {"callbacks.run_report.next_command"}
        decay = {"model.schedule.decay_start_step", "model.schedule.decay_steps"}
        assert self.keys(CONFIGS / "stage2.yaml") == every | {"data.stages.stage2"}
        assert self.keys(CONFIGS / "stage3.yaml") == every | decay | {"data.stages.stage3"}

    def test_three_segments_in_the_proportions_of_the_recipe(self, tmp_path: Path) -> None:
        cli = main(
            ["fit", "--config", str(CONFIGS / "stage3.yaml"), "--runs_dir", str(tmp_path)],
            run=False,
        )
        data, end = cli.datamodule, cli.trainer.max_steps
        run = planned(data.stages, data.context_length, data.global_batch_tokens)
        assert [segment.stage for segment in run] == list(STAGES)
        assert [segment.weights for segment in run] == [
            {"prose": 0.84, "code": 0.13, "maths": 0.03},
            {"prose": 0.76, "code": 0.15, "maths": 0.09},
            {"prose": 0.64, "code": 0.23, "maths": 0.13},
        ]
        for segment, phase in zip(run, STAGES, strict=True):
            web = segment.weights["prose"]
            assert 100 * web == pytest.approx(share(phase, *TOTALS["web"][0]), abs=0.6)

        stops = [*(segment.start_step for segment in run[1:]), end]
        lengths = [stop - segment.start_step for segment, stop in zip(run, stops, strict=True)]
        published = [3_450_000, 748_000, 522_000]
        for length, steps in zip(lengths, published, strict=True):
            assert length / end == pytest.approx(steps / 4_720_000, abs=0.01)

    def test_decay_is_the_last_ninth_of_the_run(self, tmp_path: Path) -> None:
        config = load_config([CONFIGS / "stage3.yaml"])
        end = config["trainer"]["max_steps"]
        words = ["fit", "--config", str(CONFIGS / "stage3.yaml"), "--runs_dir", str(tmp_path)]
        schedule = main(words, run=False).model.schedule
        start = config["data"]["init_args"]["stages"]["stage3"]["start_step"]
        assert schedule(start) == 1 > schedule(start + 1)
        assert schedule((start + end) // 2) == pytest.approx(0.5)
        assert schedule(end - 1) > 0 == schedule(end)
        assert (end - start) / end == pytest.approx(0.1106, abs=0.005)
