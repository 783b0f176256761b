"""The stream of plans refuses whatever is not the next plan, whole and unchanged."""

import socket

import msgspec
import pytest

from jaxserve.engine import plan_stream
from jaxserve.engine.plan_stream import Beat, Chain, Hello, Launch, Peer, Plan, StreamError, encode_frame

STEP = [Launch(3, b"\1\0\0\0"), Launch(0, b"")]


@pytest.fixture
def pair():
    """(a bare socket, the Peer at its other end)"""
    ours, theirs = socket.socketpair()
    peer = Peer(theirs, "host 1", 1.0)
    yield ours, peer
    ours.close()
    peer.close()


# ---- numbers and hashes ----


def test_plans_arrive_in_order_with_their_launches(pair):
    ours, peer = pair
    sender, receiver = Chain(), Chain()
    for number in (1, 2, 3):
        ours.sendall(encode_frame(sender.seal(STEP)))
        plan = peer.receive()
        assert isinstance(plan, Plan)
        receiver.check(plan)
        assert (plan.number, plan.launches) == (number, STEP)


def test_missed_plan_is_noticed_by_its_number():
    sender, receiver = Chain(), Chain()
    sender.seal(STEP)
    with pytest.raises(StreamError, match="plan 2 came, expected 1"):
        receiver.check(sender.seal(STEP))


def test_repeated_plan_is_noticed_by_its_number():
    sender, receiver = Chain(), Chain()
    plan = sender.seal(STEP)
    receiver.check(plan)
    with pytest.raises(StreamError, match="plan 1 came, expected 2"):
        receiver.check(plan)


@pytest.mark.parametrize(
    "launches",
    [
        [Launch(3, b"\2\0\0\0"), Launch(0, b"")],
        [Launch(2, b"\1\0\0\0"), Launch(0, b"")],
        [Launch(0, b""), Launch(3, b"\1\0\0\0")],
        [Launch(3, b"\1\0\0\0")],
        [Launch(3, b"\1\0"), Launch(0, b"\0\0")],
    ],
    ids=["another value", "another program", "another order", "one too few", "another split"],
)
def test_changed_plan_is_noticed_by_its_digest(launches):
    plan = Chain().seal(STEP)
    with pytest.raises(StreamError, match=r"plan 1 has digest .*, expected"):
        Chain().check(msgspec.structs.replace(plan, launches=launches))


def test_plan_after_another_past_is_noticed_by_its_digest():
    sender, receiver = Chain(), Chain()
    sender.seal(STEP)
    receiver.check(Chain().seal([]))
    with pytest.raises(StreamError, match="plan 2 has digest"):
        receiver.check(sender.seal(STEP))


# ---- frames ----


def test_announced_length_beyond_the_limit_is_refused_before_it_is_read(pair):
    ours, peer = pair
    ours.sendall((plan_stream.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(StreamError, match="host 1 announced 67108865 bytes; at most 67108864 are taken"):
        peer.receive()


def test_message_beyond_the_limit_is_not_sent(monkeypatch):
    monkeypatch.setattr(plan_stream, "MAX_FRAME_BYTES", 100)
    with pytest.raises(AssertionError, match="exceeds 100"):
        encode_frame(Chain().seal([Launch(0, bytes(100))]))


@pytest.mark.parametrize("sent", [2, 4, 10])
def test_message_cut_short_is_no_message(pair, sent):
    ours, peer = pair
    frame = encode_frame(Chain().seal(STEP))
    ours.sendall(frame[:sent])
    ours.close()
    at, of = (sent, 4) if sent < 4 else (sent - 4, len(frame) - 4)
    with pytest.raises(StreamError, match=f"closed the connection after {at} of {of} bytes"):
        peer.receive()


def test_end_between_messages_is_the_peers_end(pair):
    ours, peer = pair
    ours.sendall(encode_frame(Beat()))
    ours.close()
    assert peer.receive() == Beat()
    with pytest.raises(StreamError, match=r"host 1 closed the connection$"):
        peer.receive()


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", msgspec.msgpack.encode({"type": "Plan"}), msgspec.msgpack.encode({"type": "Run"})]
)
def test_junk_is_refused(pair, body):
    ours, peer = pair
    ours.sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises(StreamError, match="host 1 sent what is no message"):
        peer.receive()


def test_peer_that_takes_nothing_is_given_up(pair):
    _, peer = pair
    with pytest.raises(StreamError, match="host 1 cannot be reached"):
        peer.send(Hello(1, {"x": "y" * 2**22}))
