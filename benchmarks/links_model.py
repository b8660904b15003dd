"""How long exchanges take on paper: the program of every rank, replayed on modelled links, senders and engines.

Nothing is fitted: all that goes in are a rate, a latency and what each rank does in which order (`Start`, `Wait`,
`Compute`). The rows of an exchange that go to another node pass

1. the sender of their rank, which spends `latency` on each such message, one after another;
2. their connection, one for each group and pair of ranks, in the order in which they were begun; they may go when
   the receiver has asked for them, and its request waits, on the same connection, behind what the receiver sends;
3. the link that leaves their node: connections that have something to send get equal shares of it.

Inside a node rows arrive at once. An exchange is over for a rank when all that it gets has come, and all that it
sends has gone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

SOON = 1e-9  # seconds that are as good as none


@dataclass(frozen=True)
class Ask:
    """Ask for the rows of an exchange that begins later: bytes from each rank of a group."""

    group: tuple[int, ...]
    receive: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Begin an exchange: bytes for and from each rank of a group. A rank's exchanges are numbered in order.

    `asked`: it is the oldest of those that were asked for; else its rows are asked for now.
    """

    group: tuple[int, ...]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    asked: bool = False


@dataclass(frozen=True)
class Wait:
    """Wait for the exchange of this number, from 0."""

    number: int


@dataclass(frozen=True)
class Compute:
    """Be busy."""

    seconds: float


Action = Ask | Start | Wait | Compute
Key = tuple[int, tuple[int, ...], int]  # a rank, a group, and which of its exchanges


@dataclass
class Exchange:
    """One rank's part of the `place`-th exchange of a group."""

    rank: int
    group: tuple[int, ...]
    receive: tuple[int, ...]
    place: int
    send: tuple[int, ...] = ()
    asked: bool = False
    begun: bool = False
    to_go: int = 0
    to_come: int = 0

    def key(self, rank: int) -> Key:
        return rank, self.group, self.place

    @property
    def over(self) -> bool:
        return self.begun and not self.to_go and not self.to_come


@dataclass
class Rank:
    """A program that is being run."""

    actions: deque[Action]
    free: float = 0.0
    known: list[Exchange] = field(default_factory=list)  # begun, or asked for
    exchanges: list[Exchange] = field(default_factory=list)  # begun
    unsent: deque[tuple[float, Exchange]] = field(default_factory=deque)  # and when the sender is done with it


@dataclass
class Message:
    """Rows on their way to another node; or the request, which weighs nothing, for those that come from there."""

    left: float
    exchange: Exchange
    target: int
    is_request: bool = False


class Replay:
    """One replay of the programs of all ranks.

    Args:
        programs: what each rank does.
        per_node: ranks of a node, which come one after another.
        rate: bytes per second that leave a node.
        latency: seconds of its sender that a message to another node takes.
    """

    def __init__(
        self, programs: Sequence[Sequence[Action]], per_node: int, rate: float, latency: float = 0.0
    ) -> None:
        self.per_node, self.rate, self.latency = per_node, rate, latency
        self.now = 0.0
        self.ranks = [Rank(deque(program)) for program in programs]
        self.lines: dict[tuple[tuple[int, ...], int, int], deque[Message]] = {}
        self.by_key: dict[Key, Exchange] = {}
        self.asked: set[tuple[Key, int]] = set()  # rows of an exchange for a rank, which it asked for
        self.early: Counter[Key] = Counter()  # messages that came before their receiver had begun

    def seconds(self) -> float:
        """When the last rank is done.

        Raises:
            ValueError: programs that wait for each other for ever.
        """
        while True:
            while any(self._act(number, rank) for number, rank in enumerate(self.ranks)):
                pass
            if not any(rank.actions for rank in self.ranks):
                return max(self.now, *(rank.free for rank in self.ranks))
            self._pass_time()

    def _act(self, number: int, rank: Rank) -> bool:
        """The next thing that a rank or its sender can do now; whether there is one."""
        if rank.unsent and rank.unsent[0][0] <= self.now + SOON:
            self._begin(rank.unsent.popleft()[1])
            return True
        if not rank.actions or rank.free > self.now + SOON:
            return False
        action = rank.actions[0]
        if isinstance(action, Wait) and not rank.exchanges[action.number].over:
            return False
        rank.actions.popleft()
        if isinstance(action, Compute):
            rank.free = self.now + action.seconds
        elif isinstance(action, Ask):
            self._ask(self._next(number, rank, action))
        elif isinstance(action, Start):
            exchange = self._asked_for(rank, action.group) if action.asked else self._next(number, rank, action)
            exchange.send, exchange.asked = action.send, action.asked
            rank.exchanges.append(exchange)
            far = sum(bool(size) for peer, size in self._peers(action.send, exchange) if self._far(number, peer))
            since = rank.unsent[-1][0] if rank.unsent else self.now
            rank.unsent.append((since + far * self.latency, exchange))
        return True

    @staticmethod
    def _next(number: int, rank: Rank, action: Ask | Start) -> Exchange:
        place = sum(other.group == action.group for other in rank.known)
        rank.known.append(Exchange(number, action.group, action.receive, place))
        return rank.known[-1]

    @staticmethod
    def _asked_for(rank: Rank, group: tuple[int, ...]) -> Exchange:
        begun = {id(exchange) for exchange in rank.exchanges}
        return next(each for each in rank.known if each.group == group and id(each) not in begun)

    @staticmethod
    def _peers(sizes: Sequence[int], exchange: Exchange) -> list[tuple[int, int]]:
        return list(zip(exchange.group, sizes, strict=True))

    def _far(self, rank: int, peer: int) -> bool:
        return rank // self.per_node != peer // self.per_node

    def _ask(self, exchange: Exchange) -> None:
        """Ask for all rows."""
        for peer, size in self._peers(exchange.receive, exchange):
            if size and self._far(exchange.rank, peer):
                self._put(Message(0, exchange, peer, is_request=True))

    def _begin(self, exchange: Exchange) -> None:
        """Ask for all rows, unless that is done, then send all."""
        rank = exchange.rank
        if not exchange.asked:
            self._ask(exchange)
        exchange.begun = True
        self.by_key[exchange.key(rank)] = exchange
        exchange.to_come += sum(map(bool, exchange.receive)) - self.early[exchange.key(rank)]
        for peer, size in self._peers(exchange.send, exchange):
            if size and self._far(rank, peer):
                exchange.to_go += 1
                if (exchange.key(rank), peer) in self.asked:
                    self._put(Message(size, exchange, peer))
            elif size:
                self._came(exchange.key(peer))

    def _put(self, message: Message) -> None:
        line = self.lines.setdefault((message.exchange.group, message.exchange.rank, message.target), deque())
        line.append(message)
        self._take_requests(line)

    def _take_requests(self, line: deque[Message]) -> None:
        """Requests at the head of a line arrive; who has the rows sends them."""
        while line and line[0].is_request:
            request = line.popleft()
            key, peer = request.exchange.key(request.target), request.exchange.rank
            self.asked.add((key, peer))
            if key in self.by_key:
                exchange = self.by_key[key]
                self._put(Message(dict(self._peers(exchange.send, exchange))[peer], exchange, peer))

    def _came(self, key: Key) -> None:
        if key in self.by_key:
            self.by_key[key].to_come -= 1
        else:
            self.early[key] += 1

    def _speeds(self) -> dict[tuple[tuple[int, ...], int, int], float]:
        """Bytes per second of each connection that has something to send."""
        busy = [pair for pair, line in self.lines.items() if line]
        shares = Counter(source // self.per_node for _, source, _ in busy)
        return {pair: self.rate / shares[pair[1] // self.per_node] for pair in busy}

    def _pass_time(self) -> None:
        """Go on to the next moment at which anything ends."""
        speeds = self._speeds()
        ends = [self.lines[pair][0].left / speed for pair, speed in speeds.items()]
        for rank in self.ranks:
            ends += [rank.free - self.now] if rank.actions else []
            ends += [rank.unsent[0][0] - self.now] if rank.unsent else []
        step = min((end for end in ends if end > SOON), default=None)
        if step is None:
            raise ValueError("the ranks wait for each other for ever: their exchanges are not the same ones")
        self.now += step
        for pair, speed in speeds.items():
            self.lines[pair][0].left -= speed * step
        for pair in speeds:
            line = self.lines[pair]
            if line[0].left <= SOON * self.rate:
                message = line.popleft()
                message.exchange.to_go -= 1
                self._came(message.exchange.key(message.target))
                self._take_requests(line)
