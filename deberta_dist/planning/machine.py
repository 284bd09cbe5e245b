"""The machine that a layout runs on, as numbers: rates of devices and links, and which ranks share them.

``GPUS`` has the numbers of data sheets, each times the share of it that programs reach. Flags of ``deberta-dist plan`` replace
single numbers, ``calibrated`` replaces them by measured ones. Read by ``step_cost.py``. Plain values: nothing here looks at
the machine that the planner itself runs on.

**Source** of ``GPUS``: NVIDIA's data sheets of the SXM parts (H200, H100, A100 of 80 and of 40 GB, V100 of 32 GB): dense
bf16 tensor-core FLOP/s (V100: fp16), memory, memory bandwidth, NVLink and PCIe, of which a direction is half; NIC of
a GPU by NVIDIA's system of eight: DGX H200 and H100 400 Gb/s each, DGX A100 200 Gb/s each, DGX-1 four of 100 Gb/s.
Host memory: channels of the processors of these systems, an eighth of both.

**Assumed**, not measured by us: the shares reached (``PRODUCTS_REACH``, ``MEMORY_REACHES``, ``LINKS_REACH``), latencies, and
``SECONDS_PER_CALL`` of the host. With them 64 H100 reach a third of their peak in the best step of the 1.5B model, the order of
magnitude that is published for such trainers; no more is claimed. ``--calibration`` replaces them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.files.strict_json import loads, read_configuration

# Share of the peak reached by matrix products of the 1.5B's sizes (thousands of rows, 1,536 to 6,144 columns); share of the
# nominal bandwidth reached by passes over memory and by messages of megabytes.
PRODUCTS_REACH, MEMORY_REACHES, LINKS_REACH, HOST_REACHES = 0.6, 0.8, 0.75, 0.5
# PyTorch without a compiler: from the start of one operation to that of the next, autograd included, on one host core.
SECONDS_PER_CALL = 6e-6
NODE_LATENCY, NETWORK_LATENCY = 5e-6, 12e-6
# Calls of engine, optimizer and schedule in a step: everything that does not grow with the model.
SECONDS_PER_STEP = 20e-3

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send")


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Attributes:
        latency: Seconds of an empty message.
        bandwidth: Bytes per second that a rank sends while it receives as many.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Resources of one rank, its own and shared.

    Attributes:
        name: Shown in reports.
        peak: FLOP/s of the data sheet, the base of MFU; 0 if unknown.
        product_rate: FLOP/s that matrix products reach.
        memory: Bytes of memory of one device.
        memory_bandwidth: Bytes/s that passes over its memory reach, reads and writes together.
        seconds_per_call: Seconds that the host takes to start one operation.
        calls_overlap: Whether the host runs ahead of the device (a GPU), so that only the slower of the two counts.
        has_fused_attention: Whether attention holds nothing of the size queries x keys in memory (``kernels/fused``).
        node_size: Number of devices in a node.
        node: Link within a node.
        network: Link between nodes: one device's share of the node's network.
        host_bandwidth: Bytes/s between one device and its host.
        host_memory_bandwidth: Bytes/s of the host's memory for one device's optimizer, with offload.
        step_seconds: Seconds per step that do not depend on the model.
        cores: 0 if every rank has a device of its own. Otherwise the number of cores that all processes share: with k times
            more processes than cores, computing takes k times as long.
        kinds: Kind of message (``KINDS``) -> measured link, in place of ``node`` and ``network``.
    """

    name: str
    peak: float
    product_rate: float
    memory: float
    memory_bandwidth: float
    seconds_per_call: float
    calls_overlap: bool
    has_fused_attention: bool
    node_size: int
    node: Link
    network: Link
    host_bandwidth: float
    host_memory_bandwidth: float
    step_seconds: float = SECONDS_PER_STEP
    cores: int = 0
    kinds: Mapping[str, Link] = field(default_factory=dict)

    def busy(self, processes: int) -> float:
        """Factor on the time of computing when ``processes`` compute at the same time, 1 or more."""
        return max(1.0, processes / self.cores) if self.cores else 1.0

    def link(self, kind: str, *, size: int, stride: int) -> Link:
        """The link between ``size`` ranks whose numbers are ``stride`` apart.

        A ring over nodes enters and leaves each node once, so the network cards of all its ranks in a node work for it
        together.
        """
        if kind in self.kinds:
            return self.kinds[kind]
        here = min(size, max(1, self.node_size // stride))
        if here == size:
            return self.node
        return Link(self.network.latency, min(self.node.bandwidth, here * self.network.bandwidth))

    def seconds(self, kind: str, num_bytes: float, *, size: int, stride: int) -> float:
        """One collective of ``size`` ranks, or a ``send``, in seconds.

        With n ranks, latency a, bandwidth b and a message buffer of m bytes (the larger of input and output)::

            all_reduce                    2 log2(n) a + 2 (n - 1)/n m/b
            all_gather, reduce_scatter      log2(n) a +   (n - 1)/n m/b
            broadcast, reduce, send         log2(n) a +             m/b

        Source: bytes of the ring algorithms, which are the least possible (Patarasuk and Yuan 2009; NCCL's "bus
        bandwidth"); latency of trees, which communication libraries take for small messages.
        """
        if size == 1 or num_bytes == 0:
            return 0.0
        link, hops = self.link(kind, size=size, stride=stride), math.ceil(math.log2(size))
        ring = (size - 1) / size
        latencies, share = {
            "all_reduce": (2 * hops, 2 * ring),
            "all_gather": (hops, ring),
            "reduce_scatter": (hops, ring),
        }.get(kind, (hops, 1.0))
        return latencies * link.latency + share * num_bytes / link.bandwidth


def _gpu(
    name: str,
    tera_flops: float,
    gigabytes: float,
    memory: float,
    nvlink: float,
    nic_gigabits: float,
    pcie: float,
    host: float,
    *,
    has_fused_attention: bool = True,
) -> Machine:
    """A GPU in the units of its data sheet, one column of the table below each.

    Args:
        name: Shown in reports.
        tera_flops: Dense 16-bit tensor-core peak, TFLOP/s.
        gigabytes: Memory, GB.
        memory: Memory bandwidth, GB/s.
        nvlink: Bandwidth of NVLink, both directions together, GB/s.
        nic_gigabits: One GPU's network card, Gb/s.
        pcie: Bandwidth of PCIe, both directions together, GB/s.
        host: Host memory bandwidth per GPU, GB/s.
        has_fused_attention: Whether the compute capability is enough for the fused kernels.
    """
    return Machine(
        name=name,
        peak=tera_flops * 1e12,
        product_rate=PRODUCTS_REACH * tera_flops * 1e12,
        memory=gigabytes * 1e9,
        memory_bandwidth=MEMORY_REACHES * memory * 1e9,
        seconds_per_call=SECONDS_PER_CALL,
        calls_overlap=True,
        has_fused_attention=has_fused_attention,
        node_size=8,
        node=Link(NODE_LATENCY, LINKS_REACH * nvlink / 2 * 1e9),
        network=Link(NETWORK_LATENCY, LINKS_REACH * nic_gigabits / 8 * 1e9),
        host_bandwidth=LINKS_REACH * pcie / 2 * 1e9,
        host_memory_bandwidth=HOST_REACHES * host * 1e9,
    )


GPUS: Mapping[str, Machine] = MappingProxyType(
    {
        "h200": _gpu("H200", 989, 141, 4800, 900, 400, 128, 77),
        "h100": _gpu("H100", 989, 80, 3350, 900, 400, 128, 77),
        "a100-80": _gpu("A100 80 GB", 312, 80, 2039, 600, 200, 64, 51),
        "a100-40": _gpu("A100 40 GB", 312, 40, 1555, 600, 200, 64, 51),
        # Compute capability 7.0; the fused kernels need 8.0.
        "v100-32": _gpu("V100 32 GB", 125, 32, 900, 300, 50, 32, 19, has_fused_attention=False),
    }
)
WITHOUT_BF16 = ("v100-32",)

# Plain numbers of a machine that a calibration may give, and the links.
NUMBERS = (
    "product_rate",
    "memory",
    "memory_bandwidth",
    "seconds_per_call",
    "host_bandwidth",
    "host_memory_bandwidth",
    "step_seconds",
)
LINKS = ("node", "network")
SWITCHES = ("calls_overlap", "has_fused_attention")


def calibrated(machine: Machine, measured: Mapping[str, Any], *, processes: int, source: str) -> Machine:
    """Replaces a machine's numbers by measured ones.

    Args:
        machine: Has the numbers that were not measured.
        measured: From ``read_calibration``. Keys are fields of ``Machine``; ``kinds`` has links by kind of message; a link is
            ``{"latency": seconds, "bandwidth": bytes/s}``. Under ``processes`` are such tables by number of processes: that
            of the smallest measured number not below ``processes``, or else of the largest, overrides the rest.
        processes: Number of ranks of the run.
        source: Path of the calibration, for messages.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or range.
    """
    table = {key: value for key, value in measured.items() if key not in ("processes", "about")}
    by_number = measured.get("processes", {})
    if by_number:
        numbers = sorted(map(int, by_number))
        table |= by_number[str(next((number for number in numbers if number >= processes), numbers[-1]))]
    # A machine whose processes share cores has no data sheet's peak.
    changed: dict[str, Any] = {"peak": 0.0} if "cores" in table else {}
    for key, value in table.items():
        if key == "name" and isinstance(value, str):
            changed[key] = value
        elif key in LINKS:
            changed[key] = _link(value, key=key, source=source)
        elif key == "kinds":
            unknown = sorted(set(value) - set(KINDS))
            if unknown:
                raise ConfigError(f"{source}: kinds.{unknown[0]} is not a kind of message; known are {', '.join(KINDS)}")
            changed[key] = {kind: _link(one, key=f"kinds.{kind}", source=source) for kind, one in value.items()}
        elif key in NUMBERS:
            changed[key] = _positive(value, key=key, source=source)
        elif (key in ("cores", "node_size") and type(value) is int and value > 0) or (
            key in SWITCHES and isinstance(value, bool)
        ):
            changed[key] = value
        elif key in ("cores", "node_size", *SWITCHES):
            wanted = "true or false" if key in SWITCHES else "a positive integer"
            raise ConfigError(f"{source}: {key} = {value!r}; expected {wanted}")
        else:
            known = ", ".join((*NUMBERS, *LINKS, "kinds", "cores", "node_size", *SWITCHES, "name", "processes", "about"))
            raise ConfigError(f"{source}: unknown key {key}; known are {known}")
    return dataclasses.replace(machine, **changed)


def read_calibration(path: Path) -> dict[str, Any]:
    """Reads a calibration, written by ``deberta-dist calibrate`` or by hand.

    Raises:
        ConfigError: it cannot be read, is not JSON, or its "processes" are not objects by number of processes.
    """
    try:
        found = loads(read_configuration(path, shown=f"--calibration {path}"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--calibration {path}: not valid JSON: {error}") from None
    by_number = found.get("processes", {}) if isinstance(found, dict) else None
    tables = by_number.items() if isinstance(by_number, dict) else [("", None)]
    if not all(isinstance(table, dict) and number.isdecimal() and int(number) > 0 for number, table in tables):
        raise ConfigError(
            f'--calibration {path}: expected an object, with "processes" an object of objects by number of processes'
        )
    return found


def _link(value: Any, *, key: str, source: str) -> Link:
    if not isinstance(value, dict) or set(value) != {"latency", "bandwidth"}:
        raise ConfigError(f'{source}: {key} must be {{"latency": seconds, "bandwidth": bytes per second}}, not {value!r}')
    return Link(**{name: _positive(number, key=f"{key}.{name}", source=source) for name, number in value.items()})


def _positive(value: Any, *, key: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{source}: {key} = {value!r}; expected a positive number")
    return float(value)
