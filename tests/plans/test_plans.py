"""Plans as files: what is read back, what is refused and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import plans
from meshwright.errors import BadPlanFile, BadRequest, PlanRefused

GOLDEN = Path(__file__).parents[1] / "golden" / "plan_2_stages.json"

JUNK = st.sampled_from([None, True, -1, 0, 3, 2.5, "3", "", [], {}, [[1]], {"a": 1}, 2**62])


def golden() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(GOLDEN.read_text())
    return value


def changed(path: str, new: object) -> str:
    """The golden plan with ``new`` at the dotted ``path``."""
    value = golden()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = value
    for part in parents:
        target = target[part]
    target[last] = new
    return json.dumps(value)


def message(text: str) -> str:
    with pytest.raises(BadPlanFile) as caught:
        plans.read_plan(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_golden_plan_is_written_as_it_was_read(tmp_path: Path) -> None:
    plan = plans.read_plan(GOLDEN)
    plans.write_plan(plan, tmp_path / "plan.json")

    assert GOLDEN.read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert [tmp_path / "plan.json"] == list(tmp_path.iterdir())


def test_order_of_free_keys_changes_no_text() -> None:
    value = golden()
    value["segments"][1]["shard"] = dict(reversed(value["segments"][1]["shard"].items()))

    assert GOLDEN.read_text() == plans.plan_text(plans.read_plan(json.dumps(value)))


@pytest.mark.parametrize(
    ("path", "new", "expected"),
    [
        ("mesh.tp", 0, "$.mesh.tp: expected int >= 1, got 0"),
        ("mesh.tp", True, "$.mesh.tp: expected int, got bool"),
        ("mesh.tp", "3", "$.mesh.tp: expected int, got str"),
        ("mesh.tp", 2.0, "$.mesh.tp: expected int, got float"),
        ("mesh.tq", 2, "$.mesh.tq: unknown key"),
        ("mesh.a\nb", 2, '$.mesh["a\\nb"]: unknown key'),
        ("segments.0.shard.tp", 3, "$.segments[0].shard.tp: expected array, got int"),
        ("segments.0.shard.xp", ["a"], "$.segments[0].shard: has the unknown axis 'xp'"),
        ("segments.0.shard.[ ]", [1], '$.segments[0].shard["[ ]"][0]: expected str, got int'),
        ("segments.1.segment_class", 0, "$.segments[1].segment_class: class 0 has two entries"),
        ("segments.1.segment_class", 2, "$.segments[1].segment_class: must be 0 or 1, got 2"),
        ("segments.0.segment_class", 1, "$.segments[0].segment_class: must be 0, got 1"),
        ("segments.0.zero_stage", 4, "$.segments[0].zero_stage: expected int <= 3, got 4"),
        ("stages.1.last_segment", 0, "$.stages[1].last_segment: is 0, before first_segment 2"),
        ("stages.1.last_segment", 3, "$.stages[1].last_segment: must be at most 2"),
        ("stages.1.first_segment", 1, "$.stages[1].first_segment: segment 1 already belongs to"),
        ("model.num_segments", 2**62, "$.stages: segment 3 of 4611686018427387904 is in no stage"),
        ("stages.0.branches", [[1, 1]], "$.stages[0].branches[0][0]: segment 1 already belongs"),
        ("stages.0.branches", [[2, 1]], "$.stages[0].branches[0][1]: is 1, before the first, 2"),
        ("stages.0.branches", [[3, 3]], "$.stages[0].branches[0][1]: must be at most 2"),
        ("stages.0.branches", [[2, 2]], "$.stages[1].first_segment: segment 2 already belongs to"),
        ("stages.0.last_segment", 0, "$.stages: segment 1 of 3 is in no stage"),
        ("stages.0.mesh", {"pp": 1}, "$.stages[0].mesh: has the unknown axis 'pp'"),
        ("stages.0.mesh", {"tp": 4}, "$.stages[0].num_devices: must be 8, the mesh of a stage"),
        ("stages.0.batch_shares", [0.5, 0.4], "$.stages[0].batch_shares: sum to 0.9; make it 1"),
        ("stages.0.batch_shares", [0.2] * 5, "$.stages[0].batch_shares: 5 hosts but the stage has"),
        ("token_slices", [64, 32], "$.token_slices: sum to 96 but job.seq_len is 128"),
        ("token_slices", [0, 128], "$.token_slices[0]: expected int >= 1"),
        ("segments.0.at", [], "$.segments[0].at: empty; name segments"),
        ("segments.0.at", [[0, 3]], "$.segments[0].at[0]: 0 to 3 is no run of segments"),
        ("segments.0.at", [[1, 0]], "$.segments[0].at[0]: 1 to 0 is no run of segments"),
        ("segments.0.at", [[0, 1], [1, 1]], "$.segments[0].at[1]: $.segments[0].at[0] already"),
        ("segments.0.operators", {"1st": {}}, "$.segments[0].operators: has the key '1st'"),
        ("segments.0.operators", {"01": {}}, "$.segments[0].operators: has the key '01'"),
        ("segments.0.operators", {"1": {"x": []}}, "operators.1: has the unknown axis 'x'"),
        ("segments.0.offload", 1, "$.segments[0].offload: expected bool, got int"),
        ("communication.pipeline", "zip", "$.communication.pipeline: invalid enum value 'zip'"),
        ("stages.1.first_device", 3, "$.stages[1].first_device: device 3 already belongs to stage"),
        ("stages.1.num_devices", 2, "$.stages[1].num_devices: must be 4, the mesh of a stage"),
        ("mesh.pp", 3, "$.stages: 2 stages but mesh.pp is 3"),
        ("job.global_batch", 6, "$.job.global_batch: 6 is not divisible by 4"),
        ("communication.bucket_bytes", 0, "$.communication.bucket_bytes: expected int >= 1"),
        ("job.optimizer.beta1", 1.0, "$.job.optimizer.beta1: expected float < 1.0, got 1.0"),
        ("schema_version", 2, "$.schema_version: this Meshwright reads version 1, got 2"),
        ("schema_version", True, "$.schema_version: this Meshwright reads version 1, got True"),
        ("job.precision", "fp9", "$.job.precision: invalid enum value 'fp9'"),
    ],
)
def test_what_is_wrong_and_where(path: str, new: object, expected: str) -> None:
    assert expected in message(changed(path, new))


def test_a_key_that_looks_like_a_path_is_spelled_out() -> None:
    value = golden()
    value["segments"][0]["shard"]['[...]"'] = [1]

    assert '$.segments[0].shard["[...]\\""][0]: expected str' in message(json.dumps(value))


@pytest.mark.parametrize("key", ["\\", '"]["', "[0]", "a.b", ""])
def test_no_key_of_a_free_object_upsets_the_reader(key: str) -> None:
    value = golden()
    value["segments"][0]["shard"] = {"tp": ["ffn"], key: ["ffn", {key: 1}]}

    assert f"$.segments[0].shard[{json.dumps(key)}][1]" in message(json.dumps(value))


def test_zero_needs_something_to_shard_over() -> None:
    value = golden()
    value["mesh"] |= {"dp_shard": 1, "dp_replicate": 2}

    assert "$.segments[0].zero_stage: 1 needs mesh.dp_shard > 1" in message(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": {"b": 1, "b": 2}}', "$.a.b: the key stands twice"),
        ('{"a": NaN}', "$.a: NaN is not a number"),
        ('{"a": [1, -Infinity]}', "$.a[1]: -Infinity is not a number"),
        ('{"a": 1e999}', "$.a: 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "out of the 64-bit range"),
        ('{"a": "\\ud800"}', "$.a: the string holds half a surrogate pair"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ('{"a": "' + "[" * 100, "not JSON"),
        ("{" + '"' + '\\"' * 100_000, "not JSON"),
        ("[]", "$: a plan is a JSON object"),
        ("{}", "$.schema_version: the key is missing"),
        ('{"a": "' + "x" * 2**24 + '"}', "larger than 16 MiB"),
        ("no/such/plan.json", "no such plan file"),
        ("\0", "cannot read the plan file"),
        ("/", "cannot read the plan file"),
    ],
)
def test_what_is_no_plan_at_all(text: str, expected: str) -> None:
    assert expected in message(text)


def test_invalid_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b'{"a": "\xff"}')

    with pytest.raises(BadPlanFile, match="byte 7 is not valid UTF-8"):
        plans.read_plan(tmp_path / "plan.json")


def test_a_bad_part_cannot_be_made_in_python() -> None:
    with pytest.raises(ValueError, match="tp must be at least 1, got 0"):
        plans.Mesh(tp=0)
    with pytest.raises(ValueError, match="learning_rate must be at least 0, got nan"):
        plans.OptimizerSpec(learning_rate=float("nan"))


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(plans.read_plan(GOLDEN), num_microbatches=5)
    (tmp_path / "plan.json").write_text("old")

    with pytest.raises(BadPlanFile, match="not divisible"):
        plans.write_plan(plan, tmp_path / "plan.json")
    assert "old" == (tmp_path / "plan.json").read_text()
    with pytest.raises(BadRequest, match="cannot write the file"):
        plans.write_plan(plans.read_plan(GOLDEN), tmp_path / "no" / "plan.json")


def test_hash_is_of_what_is_decided() -> None:
    plan = plans.read_plan(GOLDEN)
    renamed = plans.read_plan(changed("segments.0.name", "other"))
    decided = plans.read_plan(changed("segments.0.recompute", "full"))

    assert plans.plan_sha256(plan) == plans.plan_sha256(renamed)
    assert plans.plan_sha256(plan) != plans.plan_sha256(decided)


def test_schema_says_version_bounds_and_strictness() -> None:
    definitions = plans.plan_json_schema()["$defs"]

    assert {"const": 1} == definitions["ParallelPlan"]["properties"]["schema_version"]
    assert "schema_version" in definitions["ParallelPlan"]["required"]
    assert 1 == definitions["Mesh"]["properties"]["tp"]["minimum"]
    assert definitions["Stage"]["additionalProperties"] is False


GRAPH: dict[str, Any] = {"num_devices": 8, "num_segments": 3, "segment_classes": (0, 1, 1)}


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"num_devices": 7}, r"needs device 7 but the cluster has 7"),
        ({"num_segments": 2, "segment_classes": (0, 1)}, r"num_segments: 3 but the graph has 2"),
        ({"segment_classes": (0, 1, 2)}, r"have no entry for class 2 \(segment 2\)"),
        ({"segment_classes": (0, 0, 0)}, r"segments\[1\]: the graph has no segment of class 1"),
        ({"parameter_segments": {"w": ()}}, r"parameter w is placed on no stage"),
        ({"graph_sha256": "ff"}, r"the plan is for another program"),
        ({"known_labels": ("batch",)}, r"shard\.tp\[0\]: the graph has no dimension class 'vocab'"),
    ],
)
def test_a_plan_for_another_graph_or_cluster_is_refused(
    graph: dict[str, Any], expected: str
) -> None:
    plan = plans.read_plan(GOLDEN)
    plans.check_plan(plan, **GRAPH, parameter_segments={"w": (0,)})

    with pytest.raises(PlanRefused, match=expected):
        plans.check_plan(plan, **GRAPH | graph)


def mixed(*entries: dict[str, Any]) -> plans.ParallelPlan:
    """The golden plan whose class 1 has ``entries``, each changed so."""
    value = golden()
    first, second = value["segments"]
    value["segments"] = [first, *(second | entry for entry in entries)]
    return plans.read_plan(json.dumps(value))


def test_segments_of_one_class_may_differ() -> None:
    plan = mixed({"at": [[0, 1]], "recompute": "full"}, {"zero_stage": 2})

    plans.check_plan(plan, **GRAPH, known_labels=("batch", "vocab", "heads", "ffn"))
    assert [1, 3, 2] == [entry.zero_stage for entry in plan.segment_plans((0, 1, 1))]


def test_shares_of_the_batch_are_one_for_each_host() -> None:
    plan = plans.read_plan(changed("stages.0.batch_shares", [0.75, 0.25]))
    plans.check_plan(plan, **GRAPH, host_of_device=[0, 0, 1, 1, 2, 2, 2, 2])

    with pytest.raises(PlanRefused, match=r"stages\[0\]\.batch_shares: 2 shares but .* on 1 hosts"):
        plans.check_plan(plan, **GRAPH, host_of_device=[0] * 8)


def test_entries_of_other_classes_may_name_the_same_run() -> None:
    plan = mixed({"at": [[0, 2]]})
    first, second = plan.segments
    both = msgspec.structs.replace(
        plan, segments=[msgspec.structs.replace(first, at=[(0, 2)]), second]
    )

    assert [first.name, second.name, second.name] == [
        entry.name for entry in both.segment_plans((0, 1, 1))
    ]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"at": [[1, 1]]}], r"\$\.segments: have no entry for class 1 \(segment 2\)"),
        ([{"at": [[0, 0]]}, {}], r"segments\[1\]\.at\[0\]: no segment from 0 to 0 is of class 1"),
        (
            [{"operators": {"3": {"tp": ["sequence"]}}}],
            r"segments\[1\]\.operators\.3\.tp\[0\]: the graph has no dimension class 'sequence'",
        ),
    ],
)
def test_entries_that_do_not_cover_the_graph_are_refused(
    entries: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(PlanRefused, match=expected):
        plans.check_plan(mixed(*entries), **GRAPH, known_labels=("batch", "vocab", "heads", "ffn"))


def interleaved(**changes: Any) -> str:
    """Four stages on two groups of devices, or what ``changes`` makes of them."""
    value = golden()
    firsts = (0, 4, 0, 4)
    value["stages"] = [
        {"first_segment": i, "last_segment": i, "first_device": firsts[i], "num_devices": 4}
        for i in range(4)
    ]
    value["model"]["num_segments"] = 4
    value["schedule"] = "interleaved"
    value["stages"][3].update(changes)
    return json.dumps(value)


def test_interleaved_stages_lie_on_the_devices_of_the_first() -> None:
    plan = plans.read_plan(interleaved())

    assert (0, 1, 2, 3) == plan.stage_of_segment
    assert "it lies on those of stage 1, 4-7" in message(interleaved(first_device=0))
    assert "$.stages: 3 stages but mesh.pp is 2" in message(
        json.dumps({**json.loads(interleaved()), "stages": golden()["stages"][:1] * 3})
    )


def test_a_stage_holds_parts_of_several_branches() -> None:
    value = golden()
    value["stages"][0] |= {"first_segment": 2, "last_segment": 2, "branches": [[0, 0]]}
    value["stages"][1] |= {"first_segment": 1, "last_segment": 1}
    plan = plans.read_plan(json.dumps(value))

    assert (0, 2) == plan.stages[0].segments
    assert (0, 1, 0) == plan.stage_of_segment


@pytest.mark.parametrize(
    ("path", "new", "expected"),
    [
        ("schedule", "zb-h1", "$.schedule: the runtime does not run zb-h1"),
        ("stages.1.mesh", {"tp": 4, "dp_shard": 1}, "$.stages[1].mesh: dp_shard 1, tp 4 is not"),
        ("stages.0.batch_shares", [0.75, 0.25], "$.stages[0].batch_shares: the runtime gives"),
        ("token_slices", [96, 32], "$.token_slices: the runtime runs whole sequences"),
        ("segments.1.shard.tp", ["height"], "$.segments[1].shard.tp: the runtime does not"),
        ("segments.0.operators", {"1": {"tp": ["ring"]}}, "$.segments[0].operators.1.tp: the"),
        ("communication.tensor_parallel", "bf16", "$.communication.tensor_parallel: the runtime"),
        ("communication.pipeline", "top-k", "$.communication.pipeline: the runtime sends"),
    ],
)
def test_what_the_runtime_cannot_carry_is_named(path: str, new: object, expected: str) -> None:
    plan = plans.read_plan(changed(path, new))

    (reason,) = plans.unrunnable_reasons(plan)
    assert reason.startswith(expected)
    with pytest.raises(PlanRefused, match="plan without it to run"):
        plans.check_runnable(plan)


def test_what_the_runtime_can_carry_is_not_named() -> None:
    equal = plans.read_plan(changed("stages.0.batch_shares", [0.5, 0.5]))
    offloaded = plans.read_plan(changed("segments.0.offload", True))

    assert [] == plans.unrunnable_reasons(plans.read_plan(GOLDEN))
    assert [] == plans.unrunnable_reasons(equal)
    assert [] == plans.unrunnable_reasons(offloaded)


@st.composite
def consistent_plans(draw: st.DrawFn) -> plans.ParallelPlan:
    size = st.integers(1, 3)
    mesh = plans.Mesh(
        pp=draw(size), dp_replicate=draw(size), dp_shard=draw(size), ep=draw(size), tp=draw(size)
    )
    num_microbatches = draw(size)
    lengths = [draw(size) for _ in range(mesh.pp)]
    per_stage = mesh.num_devices_per_stage
    labels = st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=3)
    return plans.ParallelPlan(
        model=plans.GraphReference(
            reference=draw(st.text(max_size=5)),
            graph_sha256="00",
            num_parameters=draw(st.integers(0, 2**50)),
            num_segments=sum(lengths),
        ),
        cluster=draw(st.text(max_size=5)),
        job=plans.JobSpec(
            global_batch=mesh.data_parallel * num_microbatches * draw(size),
            optimizer=plans.OptimizerSpec(learning_rate=draw(st.floats(0, 1e300))),
        ),
        mesh=mesh,
        num_microbatches=num_microbatches,
        stages=[
            plans.Stage(
                first_segment=sum(lengths[:index]),
                last_segment=sum(lengths[: index + 1]) - 1,
                first_device=index * per_stage,
                num_devices=per_stage,
            )
            for index in range(mesh.pp)
        ],
        segments=[
            plans.SegmentPlan(
                segment_class=index,
                name=draw(st.text(max_size=5)),
                shard=draw(st.dictionaries(st.sampled_from(plans.AXIS_NAMES), labels)),
                zero_stage=draw(st.integers(0, 3)) if mesh.dp_shard > 1 else 0,
                recompute=draw(st.sampled_from(plans.Recompute)),
            )
            for index in range(draw(size))
        ],
        provenance=plans.Provenance(meshwright_version="0", solver="s", level="O1"),
    )


@given(plan=consistent_plans())
@settings(max_examples=60, deadline=None)
def test_every_plan_is_read_as_it_was_written(plan: plans.ParallelPlan) -> None:
    assert plan == plans.read_plan(plans.plan_text(plan))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    value = golden()
    target: Any = value
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        inner = target[key]
        if not (isinstance(inner, (dict, list)) and inner and data.draw(st.booleans())):
            break
        target = inner
    if data.draw(st.booleans()):
        del target[key]
    else:
        target[key] = data.draw(JUNK)
    text = json.dumps(value)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text(max_size=2)) + text[at:]
    try:
        plans.read_plan(text)
    except BadPlanFile as exc:
        error = str(exc)
    else:
        error = ""

    assert "\n" not in error


@pytest.mark.parametrize("key", ["mesh", "num_microbatches", "stages", "provenance"])
def test_a_key_that_stands_twice_is_named(key: str) -> None:
    text = GOLDEN.read_text().replace("{", '{"' + key + '": null,', 1)

    assert f"$.{key}: the key stands twice" in message(text)


def test_the_modules_import_no_torch() -> None:
    code = (
        "import sys, meshwright.plans, meshwright.records, meshwright.profiling.timer;"
        "sys.exit('torch' in sys.modules)"
    )

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
