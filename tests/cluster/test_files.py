from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import (
    Cluster,
    Device,
    Host,
    Link,
    cluster_from_dict,
    cluster_to_dict,
    cluster_to_toml,
    parse_cluster,
)
from meshwright.errors import BadClusterFile

OWN_DEVICE = """{ name = "own", memory_bytes = 1000, memory_bytes_per_s = 1e9, \
flop_per_s = { float32 = 1e12 }, launch_latency_s = 1e-6 }"""

MIXED_TOML = """
name = "two kinds"

[[hosts]]
count = 2
device = "a100-80gb"
num_devices = 4

[[hosts]]
device = "t4"
link = { name = "bus", bytes_per_s = 8e9, latency_s = 1e-5 }

[[levels]]
link = "ethernet-10g"
"""

MIXED_YAML = """
name: two kinds
hosts:
  - {count: 2, device: a100-80gb, num_devices: 4}
  - device: t4
    link: {name: bus, bytes_per_s: 8e9, latency_s: 1e-5}
levels:
  - link: ethernet-10g
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_toml_describes_mixed_hosts(tmp_path: Path) -> None:
    cluster = parse_cluster(write(tmp_path, "c.toml", MIXED_TOML))

    assert "two kinds" == cluster.name
    assert [("a100-sxm-80gb", 4), ("a100-sxm-80gb", 4), ("t4", 8)] == [
        (host.device.name, host.num_devices) for host in cluster.hosts
    ]
    assert ["nvlink3", "nvlink3", "bus"] == [host.link.name for host in cluster.hosts]
    assert (3, "ethernet-10g") == (cluster.levels[0][0], cluster.levels[0][1].name)


def test_yaml_and_json_say_the_same_as_toml(tmp_path: Path) -> None:
    expected = parse_cluster(write(tmp_path, "c.toml", MIXED_TOML))
    as_json = json.dumps(tomllib.loads(MIXED_TOML))

    assert expected == parse_cluster(write(tmp_path, "c.yaml", MIXED_YAML))
    assert expected == parse_cluster(write(tmp_path, "c.yml", MIXED_YAML))
    assert expected == parse_cluster(write(tmp_path, "c.json", as_json))


def test_a_device_and_links_of_ones_own(tmp_path: Path) -> None:
    text = f"""
[[hosts]]
count = 4
device = {OWN_DEVICE}
num_devices = 2
link = "pcie4"
[[levels]]
hosts_per_group = 2
link = "infiniband-ndr"
[[levels]]
link = "ethernet-10g"
"""
    cluster = parse_cluster(write(tmp_path, "lab.toml", text))

    assert ("lab", 8, "own") == (cluster.name, cluster.num_devices, cluster.device_of(0).name)
    assert [2, 4] == [hosts_per_group for hosts_per_group, _ in cluster.levels]
    assert "the user's cluster file" == cluster.device_of(0).source
    assert 0 == cluster.device_of(0).num_units


def test_compute_units_and_cache_of_ones_own_device(tmp_path: Path) -> None:
    device = OWN_DEVICE.replace(" }, launch", " }, num_units = 12, cache_bytes = 4096, launch")
    text = f'[[hosts]]\ndevice = {device}\nnum_devices = 2\nlink = "pcie4"\n'
    found = parse_cluster(write(tmp_path, "c.toml", text)).device_of(0)

    assert (12, 4096) == (found.num_units, found.cache_bytes)


def test_catalog_hosts_get_their_usual_levels(tmp_path: Path) -> None:
    text = '[[hosts]]\ndevice = "h100"\ncount = 2\n'

    assert parse_cluster("16xh100").levels == parse_cluster(write(tmp_path, "c.toml", text)).levels


BAD_TOML = [
    ("hosts = 3", r"Expected `array`, got `int` - at `\$.hosts`"),
    ('name = "x"', "missing required field `hosts`"),
    ("hosts = []", r"length >= 1 - at `\$.hosts`"),
    ('[[hosts]]\ndevice = "h100"\ncuont = 2', r"unknown field `cuont` - at `\$.hosts\[0\]`"),
    ('[[hosts]]\ndevice = "h100"\ncount = -2', r">= 1 - at `\$.hosts\[0\].count`"),
    ('[[hosts]]\ndevice = "h100"\ncount = 2.0', r"got `float` - at `\$.hosts\[0\].count`"),
    ('[[hosts]]\ndevice = "h100"\ncount = true', r"got `bool` - at `\$.hosts\[0\].count`"),
    ('[[hosts]]\ndevice = "h100"\ncount = 2\ncount = 3\n', "line 4.* in 'count = 3'"),
    ('[[hosts]]\ndevice = "h100"\ndevice = "t4"', "after 'device = \"t4\"'"),
    ('[[hosts]]\ndevice = "h10"', r"\$.hosts\[0\].device: unknown device 'h10'; did you mean h100"),
    (
        f"[[hosts]]\ndevice = {OWN_DEVICE.replace('launch', 'num_units = -1, launch')}",
        r">= 0 - at `\$.hosts\[0\].device.num_units`",
    ),
    (
        f"[[hosts]]\ndevice = {OWN_DEVICE.replace('launch', 'cache_bytes = 1.5, launch')}",
        r"got `float` - at `\$.hosts\[0\].device.cache_bytes`",
    ),
    ('[[hosts]]\ndevice = { name = "x" }', r"`memory_bytes` - at `\$.hosts\[0\].device`"),
    (f"[[hosts]]\ndevice = {OWN_DEVICE}", r"\$.hosts\[0\].num_devices is missing"),
    (f"[[hosts]]\nnum_devices = 2\ndevice = {OWN_DEVICE}", r"\$.hosts\[0\].link is missing"),
    (
        f'[[hosts]]\ncount = 2\nnum_devices = 2\nlink = "pcie4"\ndevice = {OWN_DEVICE}',
        r"\$.levels is missing",
    ),
    ('[[hosts]]\ndevice = "h100"\nlink = "nvlnk4"', r"\[0\].link: unknown link.*mean nvlink4"),
    (
        '[[hosts]]\ndevice = "h100"\nlink = { name = "x", bytes_per_s = inf, latency_s = 0 }',
        r"\$.hosts\[0\].link: .*bytes_per_s is inf",
    ),
    (
        '[[hosts]]\ndevice = "h100"\nlink = { name = "x", bytes_per_s = 1e9, latency_s = -1 }',
        r">= 0.0 - at `\$.hosts\[0\].link.latency_s`",
    ),
    (
        '[[hosts]]\ndevice = "h100"\ncount = 4\n[[levels]]\nhosts_per_group = 2\nlink = "pcie4"',
        "no level joins all 4 hosts",
    ),
    (
        '[[hosts]]\ndevice = "h100"\ncount = 4\n[[levels]]\nlink = "pcie4"\n'
        '[[levels]]\nlink = "pcie4"',
        r"\$.levels\[0\].hosts_per_group is missing",
    ),
    ('[[hosts]]\ndevice = "h100"\n[[levels]]\nlink = "pcie4"', "one host needs no levels"),
    ('[[hosts]]\ndevice = "h100"\ncount = 9999999', r"<= 1048576 - at `\$.hosts\[0\].count`"),
    ("x = [", "Invalid value"),
    ("a = " + "[" * 100_000, "nested too deeply"),
    ("# " + "x" * 2**20, "larger than 1 MiB"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TOML, ids=range(len(BAD_TOML)))
def test_bad_toml_is_one_line_with_the_path(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadClusterFile, match=message) as error:
        parse_cluster(write(tmp_path, "c.toml", text))

    assert "\n" not in str(error.value)
    assert "c.toml" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "hosts:\n  - device: h100\n    device: a100", "line 3.*key 'device' appears"),
        ("c.yaml", "hosts: &a\n  - *a", r"aliases \(\*name\) are not allowed"),
        ("c.yaml", "hosts: [", "line 1"),
        ("c.yaml", "", "got `null`"),
        ("c.yaml", "1: 2", "Expected `str`"),
        ("c.yaml", "hosts: !!python/object/apply:os.system [ls]", "could not determine"),
        ("c.yaml", "[" * 100_000, "nested too deeply"),
        ("c.json", '{"hosts": [], "hosts": []}', "key 'hosts' appears twice"),
        ("c.json", '{"hosts": NaN}', "NaN is no number"),
        ("c.json", "{", "line 1"),
        ("dir/c.cfg", "", "no such file"),
    ],
)
def test_bad_yaml_and_json_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    if "/" not in name:
        write(tmp_path, name, text)

    with pytest.raises(BadClusterFile, match=message) as error:
        parse_cluster(str(tmp_path / name))

    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadClusterFile, match=r"let the name end in \.toml"):
        parse_cluster(write(tmp_path, "c.cfg", "x"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(BadClusterFile, match="cannot read it"):
        parse_cluster(str(tmp_path / "c.toml"))


positive = st.floats(1e-3, 1e18, allow_nan=False)
words = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable())
links = st.builds(Link, name=words, bytes_per_s=positive, latency_s=st.floats(0, 1), source=words)
rates = st.dictionaries(st.sampled_from(["float64", "bfloat16", "float16"]), positive).map(
    lambda some: {"float32": 1e12, **some}
)
devices = st.builds(
    Device,
    name=words,
    memory_bytes=st.integers(1, 2**50),
    memory_bytes_per_s=positive,
    flop_per_s=rates,
    launch_latency_s=st.floats(0, 1),
    num_units=st.integers(0, 2**20),
    cache_bytes=st.integers(0, 2**40),
    source=words,
)
hosts = st.builds(Host, device=devices, num_devices=st.integers(1, 16), link=links)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    kinds = draw(st.lists(st.tuples(hosts, st.integers(1, 3)), min_size=1, max_size=3))
    all_hosts = tuple(host for host, count in kinds for _ in range(count))
    levels = []
    if len(all_hosts) > 2 and draw(st.booleans()):
        levels.append((2, draw(links)))
    if len(all_hosts) > 1:
        levels.append((len(all_hosts), draw(links)))
    return Cluster(name=draw(words), hosts=all_hosts, levels=tuple(levels))


@given(clusters())
def test_a_cluster_survives_toml_and_json(cluster: Cluster) -> None:
    as_json = json.loads(json.dumps(cluster_to_dict(cluster)))
    as_toml = tomllib.loads(cluster_to_toml(cluster))

    assert cluster == cluster_from_dict(as_json, where="json")
    assert cluster == cluster_from_dict(as_toml, where="toml")


def test_a_catalog_cluster_survives_a_file(tmp_path: Path) -> None:
    cluster = parse_cluster("144xgb200")

    assert cluster == parse_cluster(write(tmp_path, "c.toml", cluster_to_toml(cluster)))
