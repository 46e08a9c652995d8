"""A file imports from lower levels only (docs/design.md); tools are never imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dcod_jax"

# A file imports from files before it in this order only; a line is a level of docs/design.md.
LEVELS = """
    configs.base configs.study
    errors bounds types seeds stores files copies compilation_cache
    parallel.mesh parallel.collectives parallel.exit_report parallel.monitor parallel.hosts
    locks logs
    models.rope models.layer_types models.mixtures models.families models.multimodal
    models.layer_kinds models.config models.linear models.layers models.cudnn models.remat
    models.experts models.blocks models.attention models.transformer models.counts models.lora
    models.cached models.tensors models.peft models.tensor_files
    losses.head losses.distributions losses.divergences losses.weights
    losses.weight_errors losses.adaptive losses.reduce losses.routing losses.distill
    data.teachers data.codec data.kept data.dataset data.blocks data.scores data.packing
    data.records data.json_text data.reasoning data.presets data.calls data.raw data.lines
    data.schema data.unpack data.columns data.told data.answers data.forms
    data.traces data.pipeline
    models.gguf_metadata models.gguf models.gguf_tokenizer models.hf
    data.template_process data.templates data.tokenizer data.turns data.borders data.chat
    data.conversation
    sample.sampling sample.decoding sample.sampler
    evaluate.numerals evaluate.spelling evaluate.operations evaluate.algebra evaluate.units
    evaluate.regions evaluate.parts evaluate.equality evaluate.prose evaluate.expressions
    evaluate.answers evaluate.benchmarks evaluate.options evaluate.grading evaluate.problems
    evaluate.prompts
    evaluate.generations evaluate.statistics evaluate.metrics
    train.metrics train.optim train.profiling train.settings
    tune.grid config_checks config doctor cli
    train.checksums train.checkpointer train.checkpoint_reader train.local_checkpoints
    train.checkpoints train.forward train.step
    score.teacher score.alignment score.scoring score.dialects score.server
    prepare.delivered prepare.overlap prepare.filters
    generate_traces.command prepare.command score.command inspect.arguments inspect.command
    drift.curves drift.scores
    train.learned_from train.held_out train.setup train.on_policy export.card export.check
    export.command init_student.arguments init_student.prune
    init_student.command
    evaluate.command
    evaluate.lm_eval_model drift.command report.arguments report.data report.traces report.command
    plan.chips plan.hlo plan.programs plan.remat plan.estimate plan.command
    train.trace_weights train.telemetry train.loop train.command tune.command
    study.arithmetic study.letters study.domain study.conditions study.lab study.command
"""
ORDER = LEVELS.split()
PLACE = {name: place for place, name in enumerate(ORDER)}
FILES = sorted(
    p
    for p in PACKAGE.rglob("*.py")
    if p.name not in ("__init__.py", "__main__.py") and p.parent.name != "configs"
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcod_jax"):
            inside = (node.module or "").removeprefix("dcod_jax").lstrip(".")
            if inside in PLACE:
                names.add(inside)
            else:
                names |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("dcod_jax.")
                for alias in node.names
                if alias.name.startswith("dcod_jax.")
            }
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_from_lower_levels_only(path):
    name = module_name(path)
    assert name in PLACE, f"{name} has no place: add it to LEVELS"
    for other in imported(path):
        assert other in PLACE, f"{name} imports {other}, which has no place"
        assert PLACE[other] < PLACE[name], f"{name} imports {other}, which comes after it"


def test_the_package_never_imports_tools_or_configs():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert module.split(".")[0] not in ("tools", "configs", "tests"), path
