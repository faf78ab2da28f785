"""Codec of a blocks stream: BlocksMessage, the same in both directions."""

from __future__ import annotations

from typing import assert_never

from baton.rpc.codec_fleet import layout_from_pb, layout_to_pb
from baton.rpc.codec_link import unknown_kind
from baton.rpc.codec_request import error_from_pb, error_to_pb
from baton.types.blocks import (
    Ask,
    BlocksHello,
    BlocksMessage,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from baton.v1 import blocks_pb2 as pb


def blocks_to_pb(value: BlocksMessage) -> pb.BlocksMessage:
    match value:
        case BlocksHello():
            return pb.BlocksMessage(hello=_hello_to_pb(value))
        case Ask(number, keys):
            return pb.BlocksMessage(ask=pb.Ask(number=number, keys=keys))
        case Offer():
            return pb.BlocksMessage(offer=_offer_to_pb(value))
        case Lend(number, first, blocks, digests):
            lend = pb.Lend(number=number, first=first, blocks=blocks, digests=digests)
            return pb.BlocksMessage(lend=lend)
        case LendEnd(number, count):
            return pb.BlocksMessage(lend_end=pb.LendEnd(number=number, count=count))
        case RenewLoans(numbers):
            return pb.BlocksMessage(renew=pb.RenewLoans(numbers=numbers))
        case Return(number):
            return pb.BlocksMessage(give_back=pb.Return(number=number))
        case Returned(number):
            return pb.BlocksMessage(returned=pb.Returned(number=number))
        case LoanExpired(number):
            return pb.BlocksMessage(expired=pb.LoanExpired(number=number))
        case BlocksRefused(maybe, error):
            refused = pb.BlocksRefused(number=maybe, error=error_to_pb(error))
            return pb.BlocksMessage(refused=refused)
        case _:
            assert_never(value)


def blocks_from_pb(message: pb.BlocksMessage) -> BlocksMessage:
    match message.WhichOneof("kind"):
        case "hello":
            return _hello_from_pb(message.hello)
        case "ask":
            return Ask(message.ask.number, message.ask.keys)
        case "offer":
            return _offer_from_pb(message.offer)
        case "lend":
            lend = message.lend
            return Lend(lend.number, lend.first, tuple(lend.blocks), tuple(lend.digests))
        case "lend_end":
            return LendEnd(message.lend_end.number, message.lend_end.count)
        case "renew":
            return RenewLoans(tuple(message.renew.numbers))
        case "give_back":
            return Return(message.give_back.number)
        case "returned":
            return Returned(message.returned.number)
        case "expired":
            return LoanExpired(message.expired.number)
        case "refused":
            refused = message.refused
            number = refused.number if refused.HasField("number") else None
            return BlocksRefused(number, error_from_pb(refused.error))
        case _:
            raise unknown_kind("a peer", "blocks")


def _hello_to_pb(value: BlocksHello) -> pb.BlocksHello:
    return pb.BlocksHello(
        name=value.name,
        incarnation=value.incarnation,
        layout=layout_to_pb(value.layout),
        transport=value.transport,
        endpoint=value.endpoint,
        lease_ttl_s=value.lease_ttl_s,
        expected_incarnation=value.expected_incarnation,
    )


def _hello_from_pb(message: pb.BlocksHello) -> BlocksHello:
    return BlocksHello(
        name=message.name,
        incarnation=message.incarnation,
        layout=layout_from_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
        lease_ttl_s=message.lease_ttl_s,
        expected_incarnation=message.expected_incarnation,
    )


def _offer_to_pb(value: Offer) -> pb.Offer:
    return pb.Offer(
        number=value.number,
        keys=value.keys,
        blocks=value.blocks,
        depth=value.depth,
        digests=value.digests,
        pin_s=value.pin_s,
        parent=value.parent,
    )


def _offer_from_pb(message: pb.Offer) -> Offer:
    return Offer(
        number=message.number,
        keys=message.keys,
        blocks=tuple(message.blocks),
        depth=message.depth,
        digests=tuple(message.digests),
        pin_s=message.pin_s if message.HasField("pin_s") else None,
        parent=message.parent,
    )
