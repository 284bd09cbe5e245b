"""What happened on a pretended device: events, the ways to select them, and reports for failing assertions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["launch", "wait", "copy to device", "copy to host", "collective", "mismatch"]
Direction = Literal["forward", "backward", "recompute"]


@dataclass(frozen=True)
class Event:
    """One thing that a device did, or that the host had to wait for.

    Attributes:
        kind: What sort of thing.
        name: Operator, kernel, collective or reason.
        site: ``file:line`` of the innermost frame of the product, ``""`` where there is none. In a backward pass, of a
            custom function's own line where it has one, else of the forward operator.
        library: ``file:line`` of the innermost frame of a library that the product has called there, ``""`` where it has
            called torch itself.
        phases: Labels of the marks that were open, outermost first; in a backward pass those of the forward pass.
        direction: ``backward`` under autograd, ``recompute`` in a checkpoint's second forward pass, else ``forward``,
            which is all that the program does itself, the optimizer's step included.
        num_bytes: Of copies and collectives.
        is_pinned: Of copies: whether the memory of the host is page-locked.
        blocks: Of copies: whether the host waits for it; there is an event of the wait as well.
        group_size: Of collectives.
        is_on_host: Of collectives: their tensors are on the host.
    """

    kind: Kind
    name: str
    site: str
    library: str
    phases: tuple[str, ...]
    direction: Direction
    num_bytes: int = 0
    is_pinned: bool = False
    blocks: bool = False
    group_size: int = 0
    is_on_host: bool = False


class Events(Sequence[Event]):
    """Some events in order. Printed, it says what, how often and where."""

    def __init__(self, events: Sequence[Event], *, title: str) -> None:
        self._events = tuple(events)
        self._title = title

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: int) -> Event:
        return self._events[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(event.num_bytes for event in self._events)

    def where(
        self,
        condition: Callable[[Event], bool] = lambda _: True,
        *,
        within: str | Sequence[str] = (),
        direction: Direction | None = None,
        name: str = "",
        site: str = "",
    ) -> "Events":
        """Those for which all of this holds.

        Args:
            condition: Anything else.
            within: Label of a phase, or several, in all of which the event lies.
            direction: Of the event.
            name: Part of the name.
            site: Part of the site.
        """
        labels = {within} if isinstance(within, str) else set(within)
        chosen = [
            event
            for event in self._events
            if labels <= set(event.phases)
            and direction in (None, event.direction)
            and name in event.name
            and site in event.site
            and condition(event)
        ]
        words = [*sorted(labels), direction or "", name, site]
        return Events(chosen, title=", ".join([self._title, *filter(None, words)]))

    def counts(self, key: Callable[[Event], str] = lambda event: event.name) -> Counter[str]:
        """How many there are of each name, or of whatever ``key`` says."""
        return Counter(map(key, self._events))

    def report(self) -> str:
        """A line for each name and site, the most frequent first."""
        groups: dict[tuple[str, ...], list[Event]] = {}
        for event in self._events:
            groups.setdefault((event.name, event.site, event.library, event.direction), []).append(event)
        lines = [f"{self._title}: {len(self)}"]
        for (name, site, library, direction), events in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            size = sum(event.num_bytes for event in events)
            words = [name, site or "no line of the product", f"({library})" if library else "", direction]
            words.append(f"{size:,} B" if size else "")
            lines.append(f"{len(events):6} x {'  '.join(filter(None, words))}")
        return "\n".join(lines)

    __repr__ = report


@dataclass
class Record:
    """All events of a device, in order. Picklable, so that ranks can return theirs.

    Attributes:
        events: As they came.
    """

    events: list[Event] = field(default_factory=list)

    def launches(self) -> Events:
        """Operators and Triton kernels that would start at least one kernel each."""
        return self._of("launch", "launches")

    def host_waits(self) -> Events:
        """Whatever makes the host wait for the device: reads, blocking copies, synchronisations."""
        return self._of("wait", "host waits")

    def copies_to_device(self) -> Events:
        """From the host."""
        return self._of("copy to device", "copies to the device")

    def copies_to_host(self) -> Events:
        """From the device."""
        return self._of("copy to host", "copies to the host")

    def collectives(self) -> Events:
        """Messages between ranks, those between hosts included."""
        return self._of("collective", "collectives")

    def mismatches(self) -> Events:
        """What a GPU would refuse: operands on two devices, tensors that a process group cannot carry."""
        return self._of("mismatch", "mismatches")

    def clear(self) -> None:
        """Forgets what was until now."""
        self.events.clear()

    def _of(self, kind: Kind, title: str) -> Events:
        return Events([event for event in self.events if event.kind == kind], title=title)
