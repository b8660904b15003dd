"""Arithmetic on many float32 numbers at once, in LLVM's vectors, for memory that holds float32 or bfloat16."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16  # numbers of a row at once; narrower processors take several instructions for them
_INT, _SHORT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(16), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _SHORT))
_FREE = ("contract",)  # a product and a sum may become one instruction


def all_lanes(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _whole(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


class Lanes:
    """Arithmetic on `LANES` float32 numbers at once.

    Args:
        builder: of LLVM's instructions.
        short: whether memory holds bfloat16, else float32.
    """

    def __init__(self, builder: Any, short: bool) -> None:
        self.builder, self.kind = builder, _SHORTS if short else _FLOATS
        self.short = short

    def load(self, address: Any) -> Any:
        value = self.builder.load(self._place(address))
        value.align = 1
        if not self.short:
            return value
        wide = self.builder.shl(self.builder.zext(value, _INTS), _whole(16))
        return self.builder.bitcast(wide, _FLOATS)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(self._narrow(value) if self.short else value, self._place(address)).align = 1

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=_FREE)

    def times(self, *factors: Any) -> Any:
        product = factors[0]
        for factor in factors[1:]:
            product = self.builder.fmul(product, factor, flags=_FREE)
        return product

    def less(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=_FREE)

    def sigmoid(self, z: Any) -> Any:
        growth = self._exponential(self.less(all_lanes(0.0), z))
        return self.builder.fdiv(all_lanes(1.0), self.add(all_lanes(1.0), growth))

    def sum_after(self, value: Any, skipped: Any) -> Any:
        """The sum of the lanes from `skipped` on, in a fixed order."""
        builder = self.builder
        numbers = ir.Constant(_INTS, list(range(LANES)))
        first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), skipped, ir.Constant(_INT, 0))
        first = builder.shuffle_vector(first, ir.Constant(_INTS, ir.Undefined), _whole(0))
        value = builder.select(builder.icmp_signed(">=", numbers, first), value, all_lanes(0.0))
        half = LANES
        while half > 1:
            half //= 2
            order = ir.Constant(_INTS, [(lane + half) % LANES for lane in range(LANES)])
            value = self.add(value, builder.shuffle_vector(value, ir.Constant(_FLOATS, ir.Undefined), order))
        return builder.extract_element(value, ir.Constant(_INT, 0))

    def spread(self, number: Any) -> Any:
        """A vector of one number."""
        one = self.builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _whole(0))

    def _place(self, address: Any) -> Any:
        return self.builder.inttoptr(address, self.kind.as_pointer())

    def _narrow(self, value: Any) -> Any:
        """The nearest bfloat16, ties to even. What is no number stays none: its last 16 bits came from a bfloat16
        too, or from the processor, and are 0, so that nothing is carried."""
        builder = self.builder
        bits = builder.bitcast(value, _INTS)
        last = builder.and_(builder.lshr(bits, _whole(16)), _whole(1))
        rounded = builder.lshr(builder.add(bits, builder.add(last, _whole(0x7FFF))), _whole(16))
        return builder.trunc(rounded, _SHORTS)

    def _exponential(self, x: Any) -> Any:
        """exp(x) to 2e-7 of itself; beyond -87 and 88 that of the bound, which is nothing or all to a sigmoid."""
        builder = self.builder
        x = builder.select(builder.fcmp_ordered("<", x, all_lanes(88.0)), x, all_lanes(88.0))
        x = builder.select(builder.fcmp_ordered(">", x, all_lanes(-87.0)), x, all_lanes(-87.0))
        kind = ir.FunctionType(_FLOATS, [_FLOATS])
        floor = cgutils.get_or_insert_function(builder.module, kind, f"llvm.floor.v{LANES}f32")
        whole = builder.call(floor, [self.add(self.times(x, all_lanes(1.4426950408889634)), all_lanes(0.5))])
        rest = self.less(x, self.times(whole, all_lanes(0.693359375)))  # ln 2 in two parts
        rest = self.add(rest, self.times(whole, all_lanes(2.12194440e-4)))
        series = self.add(self.times(rest, all_lanes(1 / 5040)), all_lanes(1 / 720))
        for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            series = self.add(self.times(series, rest), all_lanes(factor))
        exponent = builder.add(builder.fptosi(whole, _INTS), _whole(127))
        return self.times(series, builder.bitcast(builder.shl(exponent, _whole(23)), _FLOATS))
