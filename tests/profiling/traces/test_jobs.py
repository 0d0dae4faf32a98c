"""Job traces: Records, what mixture they are, mixtures like it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.jobs import JobMixture
from meshwright.records import Record, RecordStore

_OURS = """\
job_id,source,cluster,submit_s,duration_s,gpus,gpu_type,model,model_synthetic,total_steps,is_derived_duration
a,s,c1,0,100,1,,,LM,50,true
b,s,c1,10,100,1,,,LM,50,true
c,s,c1,30,1000,8,v100_sxm2_32gb,bert,,,false
d,s,c2,5,,4,,,,,
"""
_HELIOS = """\
job_id,user,vc,gpu_num,cpu_num,state,submit_time,start_time,end_time,duration,queue
7,u1,vc1,2,8,COMPLETED,2020-04-01 00:00:09,2020-04-01 00:00:10,2020-04-01 00:01:10,60,1
8,u1,vc1,0,8,COMPLETED,2020-04-01 00:00:19,2020-04-01 00:00:20,2020-04-01 00:01:20,60,1
"""
_ALIBABA = """\
job_name,task_name,inst_num,status,start_time,end_time,plan_cpu,plan_gpu,gpu_type
j,tf,4,Terminated,1000,1600.5,600,50,T4
"""


def _records(folder: Path, text: str) -> tuple[Record, ...]:
    path = folder / "jobs.csv"
    path.write_text(text, encoding="utf-8")
    (found,) = import_traces([path])
    return found.records


def test_our_columns(tmp_path: Path) -> None:
    first, _, third, untimed = _records(tmp_path, _OURS)

    assert ("LM", "unknown", 100.0) == (first.name, first.device, first.median)
    assert {
        "job_id": "a", "cluster": "c1", "submit_s": 0.0, "gpus": 1, "model_is_synthetic": True,
        "total_steps": 50.0, "duration_is_derived": True,
    } == first.extra  # fmt: skip
    assert ("bert", "v100-sxm2-32gb", 8) == (third.name, third.device, third.extra["gpus"])
    assert ("gpus", 4.0, 4, 5.0) == (
        untimed.unit, untimed.median, untimed.extra["gpus"], untimed.extra["submit_s"],
    )  # fmt: skip


def test_columns_of_helios_and_alibaba(tmp_path: Path) -> None:
    """Dates count from 1970; four instances of half a GPU are two GPUs."""
    helios = _records(tmp_path, _HELIOS)
    (alibaba,) = _records(tmp_path, _ALIBABA)

    assert [(60.0, 2, 1585699209.0), (60.0, 0, 1585699219.0)] == [
        (record.median, record.extra["gpus"], record.extra["submit_s"]) for record in helios
    ]
    assert ("t4", 600.5, 2) == (alibaba.device, alibaba.median, alibaba.extra["gpus"])


def test_what_mixture_it_is(tmp_path: Path) -> None:
    """Two of four jobs run on one GPU, with 200 of the 8,200 GPU seconds that are known."""
    found = JobMixture.from_records(_records(tmp_path, _OURS)).summary()

    assert (4, 3) == (found["num_jobs"], found["num_jobs_of_known_duration"])
    assert {
        "num_jobs": 1, "num_jobs_of_known_duration": 0, "jobs_fraction": 0.25,
        "gpu_time_fraction": None, "median_duration_s": None,
    } == found["by_num_gpus"]["4"]  # fmt: skip
    assert 1 / 2 == pytest.approx(found["by_num_gpus"]["1"]["jobs_fraction"])
    assert 200 / 8200 == pytest.approx(found["by_num_gpus"]["1"]["gpu_time_fraction"])
    assert 100.0 == found["duration_quantiles_s"]["p50"]
    assert 15.0 == found["gap_quantiles_s"]["p50"]


def test_sampled_mixtures_are_like_it_and_repeat(tmp_path: Path) -> None:
    mixture = JobMixture.from_records(_records(tmp_path, _OURS))

    jobs = mixture.sample(np.random.default_rng(3), 3000)

    assert jobs == mixture.sample(np.random.default_rng(3), 3000)
    assert 0.0 == jobs[0].arrival_s
    assert sorted(job.arrival_s for job in jobs) == [job.arrival_s for job in jobs]
    assert 15.0 == pytest.approx(jobs[-1].arrival_s / 3000, rel=0.05)
    assert 1 / 2 == pytest.approx(sum(job.num_gpus == 1 for job in jobs) / 3000, abs=0.03)
    assert {(1, 100.0), (4, 1000.0), (8, 1000.0)} == {
        (job.num_gpus, job.duration_s) for job in jobs
    }


def test_by_gpu_time_large_jobs_count_more_and_sizes_can_be_bounded(tmp_path: Path) -> None:
    mixture = JobMixture.from_records(_records(tmp_path, _OURS))
    rng = np.random.default_rng(0)

    weighted = mixture.sample(rng, 2000, by_gpu_time=True)

    assert 8000 / 12200 == pytest.approx(
        sum(job.num_gpus == 8 for job in weighted) / 2000, abs=0.03
    )
    assert {1} == {job.num_gpus for job in mixture.sample(rng, 50, max_gpus=3)}
    with pytest.raises(BadRequest, match="no job runs on 0 GPUs; the least is 1"):
        mixture.sample(rng, 1, max_gpus=0)


def test_jobs_whose_time_nobody_knows_are_kept_and_named(tmp_path: Path) -> None:
    """Above 8 GPUs none has a duration in many traces; without them no large job would be."""
    text = "job_id,duration,gpus,submit_time,cluster\n"
    text += "".join(f"s{at},60,1,{100 * at},c\n" for at in range(9)) + "big,,64,50,c\nx,-5,2,70,c\n"
    path = tmp_path / "jobs.csv"
    path.write_text(text, encoding="utf-8")

    (found,) = import_traces([path])
    RecordStore(tmp_path / "store").append(found.records)
    mixture = JobMixture.from_records(RecordStore(tmp_path / "store").read()[0])
    jobs = mixture.sample(np.random.default_rng(1), 500)

    assert {1, 2, 64} == {job.num_gpus for job in jobs}
    assert {60.0} == {job.duration_s for job in jobs}
    assert {"durations below 0 (their jobs are kept without one)": 1} == found.summary["left_out"]
    assert any(
        "known of 9 of 11" in line and "The others had 2 to 64 GPUs" in line for line in found.lines
    )


def test_no_durations_at_all_cannot_be_sampled(tmp_path: Path) -> None:
    mixture = JobMixture.from_records(_records(tmp_path, "job_id,gpus\na,4\nb,8\n"))

    assert {"4", "8"} == set(mixture.summary()["by_num_gpus"])
    with pytest.raises(BadRequest, match="of no job is known how long it ran"):
        mixture.sample(np.random.default_rng(0), 1)


def test_no_jobs_and_bad_dates_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="import a job trace"):
        JobMixture.from_records([])
    with pytest.raises(BadRequest, match="row 1: submit_time: 'soon' is neither seconds nor"):
        _records(tmp_path, "job_id,duration,gpus,submit_time\na,1,1,soon\n")
