"""Whole steps of decoding as machine code, compiled by numba at run time; a room that only `[fast]` furnishes.

One token's share of a layer is some thirty small products. As operators each costs a call and a meeting of all
threads; here a layer is two calls, inside of which the threads meet at barriers:

    attention_step   norm, queries keys and values, rotation, scores, mixture, output, residual
    bank_step        the chosen experts of a bank and the residual

Everything is computed in float32 and read in the dtype or the codes that memory holds. Nothing here imports numba
before `why_not` has been asked.
"""

from moestro.kernels.compiled.availability import why_not

__all__ = ["why_not"]
