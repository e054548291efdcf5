"""Kernels compile for the devices they are meant for, as they are launched there; no device is needed for that.

The interpreter does not see what the compiler refuses, nor that elements are read one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

COMPILE = """
import os, re, subprocess, sys
os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR=sys.argv[1])
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from zimage.kernels import attention, fused, pictures, rounding

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32",
}
launches = []
fused._launch = lambda kernel, grid, *args, **constants: launches.append((kernel, grid, args, constants))


def launch(dtype, tokens):
    '''What a block of the released models launches; tensors without memory.'''
    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    launches.clear()
    wide = torch.float32 if dtype == torch.float16 else dtype
    stream, weight, factor = make(1, tokens, 3840, dtype=wide), make(3840), make(1, 1, 3840)
    heads, rotations = make(1, tokens, 3, 30, 128), make(1, tokens, 64, dtype=torch.complex64)
    opening = make(1, tokens, 10240)
    assert fused.normalize(stream, weight, factor, 1e-5) is not None
    assert fused.add_normalized(stream, stream, weight, factor, 1e-5) is not None
    assert fused.add_then_normalize(stream, stream, weight, factor, 1e-5, weight, factor, 1e-5) is not None
    query, key, norm = heads[:, :, 0], heads[:, :, 1], make(128)
    assert fused.rotate_normalized(query, key, norm, norm, rotations, 1e-5, 1e-5) is not None
    picture, channels = make(1, 128, tokens, 1024).to(memory_format=torch.channels_last), make(128)
    assert fused.activate_groups(picture, channels, channels, 32, 1e-6) is not None
    assert fused.activate_groups(picture, channels, channels, 32, 1e-6, channels) is not None
    for biases in ((channels, picture, channels), (channels, picture), (channels,)):
        assert pictures.add(picture, *biases) is picture
    taps = make(512, 512, 3, 3)
    for weight in (taps, taps.to(memory_format=torch.channels_last)):
        assert pictures.spread(weight) is not None
    assert fused.gate(opening, opening, 2.0**-8 if dtype == torch.float16 else 1.0, True) is opening
    return list(launches)


def launch_rounding(dtype, tokens, narrow):
    '''What it launches with activations in 8 bits, in place of some and beside them.'''
    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    launches.clear()
    wide = torch.float32 if dtype == torch.float16 else dtype
    stream, weight, factor = make(1, tokens, 3840, dtype=wide), make(3840), make(1, 1, 3840)
    opening = make(1, tokens, 10240)
    assert fused.normalize(stream, weight, factor, 1e-5, narrow) is not None
    assert fused.add_then_normalize(stream, stream, weight, factor, 1e-5, weight, factor, 1e-5, narrow) is not None
    assert fused.gate(opening, opening, 2.0**-8 if dtype == torch.float16 else 1.0, True, narrow) is not None
    assert rounding.quantize(make(1, tokens, 3840), narrow) is not None
    for width in (3840, 10240):
        product = make(tokens, width, dtype=torch.int32 if narrow == torch.int8 else torch.float32)
        scales = make(tokens, 1, dtype=torch.float32), make(width, 1, dtype=torch.float32)
        assert rounding.scale_product(product, *scales, None, dtype) is not None
    assert rounding.widen(make(10240, 3840, dtype=narrow), make(10240, 1, dtype=torch.float32), dtype) is not None
    return list(launches)


def launch_attention(dtype, tokens):
    '''What attention in float8 launches.'''
    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    launches.clear()
    query, key, norm = make(1, tokens, 30, 128), make(1, tokens, 30, 128), make(128)
    rotations, narrow = make(1, tokens, 64, dtype=torch.complex64), torch.float8_e4m3fn
    turned = fused.rotate_normalized(query, key, norm, norm, rotations, 1e-5, 1e-5, False, narrow)
    (query, query_scale, _), (key, key_scale, _) = turned
    assert attention.attend(query, query_scale, key, key_scale, make(1, tokens, 30, 128)) is not None
    return list(launches)


def launch_text(dtype, tokens):
    '''What a layer of Qwen3-4B launches.'''
    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    launches.clear()
    stream, weight, norm = make(1, tokens, 2560), make(2560), make(128)
    assert fused.normalize(stream, weight, None, 1e-6) is not None
    assert fused.add_then_normalize(stream, stream, None, None, 0.0, weight, None, 1e-6) is not None
    query, key = make(1, tokens, 32, 128), make(1, tokens, 8, 128)
    rotations = make(1, tokens, 64, dtype=torch.complex64)
    assert fused.rotate_normalized(query, key, norm, norm, rotations, 1e-6, 1e-6, True) is not None
    opening = make(1, tokens, 9728)
    assert fused.gate(opening, opening, 1.0, True) is opening
    return list(launches)


def compiled(kernel, args, constants, capability, what=None):
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": False}
    signature, aligned = {}, {}
    for number, (parameter, value) in enumerate(zip(kernel.params, args)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[number,] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            blocks = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}[{blocks}]>"
        elif isinstance(value, int):
            assert parameter.do_not_specialize, f"{kernel.__name__} would be compiled for each {parameter.name}"
            signature[parameter.name] = "i32"
        elif value is None:
            constants[parameter.name] = None
        else:
            signature[parameter.name] = "fp32"
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return asm["ptx"] if what is None else asm[what]


def registers(cubin):
    path = sys.argv[1] + "/kernel.cubin"
    with open(path, "wb") as file:
        file.write(cubin)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    printed = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\\d+)", printed)[1])


report = []
rounded = []
for dtype, capability in ((torch.bfloat16, 90), (torch.float16, 75)):
    kernels = launch(dtype, 4224)
    assert [one[3] for one in kernels] == [one[3] for one in launch(dtype, 1056)]
    texts = launch_text(dtype, 32)
    assert [one[3] for one in texts] == [one[3] for one in launch_text(dtype, 48)]
    for kernel, _, args, constants in kernels + texts:
        ptx = compiled(kernel, args, constants, capability)
        report.append([kernel.__name__, ptx.count("ld.global.v4"), ptx.count("st.global.v4"), ptx.count("st.global")])
        report[-1].append(ptx.count("atom.global.gpu.acq_rel"))
for dtype, narrow, capability in (
    (torch.bfloat16, torch.int8, 90), (torch.bfloat16, torch.float8_e4m3fn, 90), (torch.float16, torch.int8, 75),
):
    kernels = launch_rounding(dtype, 4224, narrow)
    assert [one[3] for one in kernels] == [one[3] for one in launch_rounding(dtype, 1056, narrow)]
    for kernel, _, args, constants in kernels:
        ptx = compiled(kernel, args, constants, capability)
        rounded.append([kernel.__name__, str(narrow), ptx.count("ld.global.v4"), ptx.count("st.global.v4")])
        rounded[-1] += [ptx.count(what) for what in ("cvt.rn.satfinite.e4m3x2", "0f4B400000", "st.local")]
narrow = []
for dtype in (torch.bfloat16, torch.float16):
    kernels = launch_attention(dtype, 4224)
    assert [one[3] for one in kernels] == [one[3] for one in launch_attention(dtype, 1056)]
    for kernel, _, args, constants in kernels:
        ptx = compiled(kernel, args, constants, 90)
        counts = (".e4m3.e4m3", "cp.async.bulk.tensor", "shfl.sync.idx", "prmt", "st.local", "cvt.rn.satfinite.e4m3x2")
        narrow.append([kernel.__name__, *(ptx.count(what) for what in counts)])
        narrow[-1].append(registers(compiled(kernel, args, constants, 90, "cubin")))
print(json.dumps([report, rounded, narrow]))
"""


def test_kernels_compile_and_move_sixteen_bytes_at_a_time(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Whatever the strides and the number of tokens, of which none has a kernel of its own."""
    report, rounded, attention = json.loads(run_python(COMPILE, tmp_path))
    groups = ["gather_groups", "activate_groups"]
    pictures = [*groups, *groups, *(3 * ["add_elements"]), "spread_taps", "spread_taps"]
    kernels = ["normalize_rows", "add_rows", "add_rows", "rotate_heads", *pictures, "gate_elements"]
    texts = ["normalize_rows", "add_rows", "rotate_heads", "gate_elements"]
    assert [name for name, *_ in report] == 2 * (kernels + texts)
    for name, loads, stores, all_stores, counted in report:
        if name != "spread_taps":  # weights lie both ways, and only one has input channels side by side
            assert loads >= (2 if name in groups else 4), name
        assert counted == (name == "gather_groups"), name
        if name != "gather_groups":  # its numbers are few
            assert stores == all_stores >= (16 if name == "spread_taps" else 2), name
    assert [loads for name, loads, *_ in report if name == "spread_taps"] == 2 * [0, 18]
    names = ["normalize_rows", "add_rows", "gate_rows", "quantize_rows", "scale_rows", "scale_rows", "widen_rows"]
    assert [name for name, *_ in rounded] == 3 * names
    for name, narrow, loads, stores, conversions, magic, spilled in rounded:
        assert loads >= (1 if name == "widen_rows" else 2), name
        assert stores >= 1, name
        assert not spilled, name
        # float8 by the card's own conversion; int8 by a sum that the compiler left as it is
        if name not in ("scale_rows", "widen_rows"):
            assert (conversions > 0, magic > 0) == (narrow == "torch.float8_e4m3fn", narrow == "torch.int8"), name
    assert [name for name, *_ in attention] == 2 * ["rotate_heads", "narrow_values", "attend_heads"]
    for name, products, copies, handed, picked, spilled, conversions, registers in attention:
        assert conversions >= 16, name
        assert not spilled, name
        # 8-bit products of blocks that come by themselves, of weights that stay with the thread that made them
        assert (products > 0, copies > 0) == (name == "attend_heads",) * 2, name
        assert name != "attend_heads" or (handed <= 1 and not picked), name
        # three programs of 128 threads share the 65,536 registers of a multiprocessor
        assert name != "attend_heads" or registers <= 168, name
