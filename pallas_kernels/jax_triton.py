"""Launch kernels of Pallas as texts of Triton's language: the way on if Pallas drops its Triton lowering (deprecated since JAX 0.11).

A function that calls Pallas kernels is traced, and run with each `pallas_call` replaced: its kernel is written down in Triton's language,
statement by statement, and the package triton makes Triton IR of that text. XLA compiles the IR with the program, as it does what Pallas
makes, and records the launches into graphs. So there is one text of each kernel. Nothing of Pallas' lowering takes part.

What is written down is what the kernels of a decode step need; anything else raises NotImplementedError and names the operation.
Seen with Triton 3.6 on JAX 0.11.2.
"""

import functools
import importlib.util
import linecache
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

TARGET = "__gpu$xla.gpu.triton"  # XLA's name of a kernel that is given as Triton IR
_TYPES = {"int32": "int32", "bool": "int1", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "int8": "int8"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "rem": "%", "and": "&", "or": "|", "xor": "^"}
_INFIX |= {"shift_right_arithmetic": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CALLS = {"max": "maximum", "min": "minimum", "debug_barrier": "debug_barrier"}
_CALLS |= {name: name for name in ("exp", "exp2", "log", "log2", "rsqrt")}


def missing_reason(interpret: bool) -> str | None:
    """Say why kernels cannot be launched this way; None when they can."""
    if interpret:
        return "it has no interpreter"
    return None if importlib.util.find_spec("triton") else "needs the package triton"


def launch(implementation: str, function: Callable, *arrays: Any) -> Any:
    """Compute `function(*arrays)`, its Pallas kernels lowered by Pallas ("triton") or by Triton itself ("jax_triton")."""
    if implementation != "jax_triton":
        return function(*arrays)
    program, out = jax.make_jaxpr(function, return_shape=True)(*arrays)
    structure: Any = jax.tree.structure(out)
    return structure.unflatten(_run(program, jax.tree.leaves(arrays)))


def _run(program, arrays) -> list[Any]:
    """Run a traced program, its kernels by Triton."""
    values = dict(zip((*program.jaxpr.constvars, *program.jaxpr.invars), (*program.consts, *arrays), strict=True))

    def value(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in program.jaxpr.eqns:
        given, inner = [value(atom) for atom in equation.invars], equation.params.get("jaxpr")
        if equation.primitive.name == "pallas_call":
            outs = _call(equation, given)
        elif hasattr(inner, "consts") and equation.primitive.name in ("jit", "pjit"):
            outs = _run(inner, given)
        else:
            outs = equation.primitive.bind(*given, **equation.params)
        outs = outs if equation.primitive.multiple_results or inner is not None else [outs]
        values |= dict(zip(equation.outvars, outs, strict=True))
    return [value(atom) for atom in program.jaxpr.outvars]


def _call(equation, arrays) -> list[Any]:
    """Launch one kernel."""
    params, settings = equation.params, equation.params["compiler_params"]
    grid = (*params["grid_mapping"].grid, 1, 1)[:3]
    dtypes = tuple(str(atom.aval.dtype) for atom in (*equation.invars, *equation.outvars))
    out_shape = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.outvars]
    aliases = dict(params["input_output_aliases"])
    kernel = jax.ffi.ffi_call(TARGET, out_shape, input_output_aliases=aliases, custom_call_api_version=4)
    numbers = {"num_warps": settings.num_warps, "num_stages": settings.num_stages, **dict(zip(("grid_x", "grid_y", "grid_z"), grid))}
    text = triton_ir(triton_source(params["jaxpr"], grid), dtypes, settings.num_warps, settings.num_stages)
    return list(kernel(*arrays, name="kernel", ir=text, debug=False, **{name: np.int32(number) for name, number in numbers.items()}))


@functools.cache
def triton_ir(source: str, dtypes: tuple[str, ...], num_warps: int, num_stages: int) -> str:
    """Make Triton IR of a kernel's text, whose parameters are pointers to numbers of these dtypes."""
    from triton._C.libtriton import ir, passes  # an extra
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    short = {"int32": "i32", "bool": "i1", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8"}
    signature = {f"p{i}": f"*{short[dtype]}" for i, dtype in enumerate(dtypes)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))}  # as XLA allocates arrays
    target = GPUTarget("cuda", 80, 32)  # what is made here is the same for later ones
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": num_warps, "num_stages": num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    kernel = ASTSource(compile_text(source), signature, attrs=aligned)
    module = kernel.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    inline = ir.pass_manager(context)  # XLA makes each function wait for the launch before, those too that a sum calls: leave one
    passes.common.add_inliner(inline)
    passes.common.add_symbol_dce(inline)
    inline.run(module, "inline")
    return module.str_nodebug()


@functools.cache
def compile_text(source: str):
    """Make a kernel's text what `triton.jit` makes of a function in a file."""
    import triton
    import triton.language as tl

    file = f"<kernel {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where Triton reads the text of a function
    namespace = {"tl": tl, "__name__": file}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace["kernel"])


def triton_source(jaxpr, grid: tuple[int, ...]) -> str:
    """Write down a kernel, the jaxpr of a `pallas_call` whose blocks are whole arrays, as a function of Triton's language."""
    writer = _Writer(grid)
    for i, ref in enumerate(jaxpr.invars):
        writer.names[ref] = f"p{i}"
    writer.write(jaxpr)
    parameters = ", ".join(f"p{i}" for i in range(len(jaxpr.invars)))
    return "\n".join([f"def kernel({parameters}):", *writer.lines]) + "\n"


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, Literal)


class _Writer:
    """Statements of a kernel, one for each equation; variables of the program by their names here."""

    def __init__(self, grid: tuple[int, ...]):
        self.grid, self.depth, self.number = grid, 1, 0
        self.lines: list[str] = []
        self.names: dict[Any, str] = {}

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def name(self, prefix: str = "v") -> str:
        self.number += 1
        return f"{prefix}{self.number}"

    def expression(self, atom: Any) -> str:
        if not _is_literal(atom):
            return self.names[atom]
        if atom.aval.dtype == jnp.bool_:
            return repr(bool(atom.val))
        if jnp.issubdtype(atom.aval.dtype, jnp.integer):
            return repr(int(atom.val))
        number = float(atom.val)
        return repr(number) if math.isfinite(number) else f'float("{number}")'

    def typed(self, atom: Any) -> str:
        text = self.expression(atom)
        return f"tl.full([], {text}, tl.{_TYPES[str(atom.aval.dtype)]})" if _is_literal(atom) else text

    def write(self, jaxpr) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name.removesuffix("_p")  # a barrier's, before JAX 0.12
            statement = getattr(self, f"_{name}", None)
            if statement is not None:
                statement(equation)
                continue
            given, outs = [self.expression(atom) for atom in equation.invars], equation.outvars
            if name in _INFIX:
                text = f"{given[0]} {_INFIX[name]} {given[1]}"
            elif name in _CALLS:
                text = f"tl.{_CALLS[name]}({', '.join(given)})"
            else:
                text = self.formula(name, given, equation.params, equation)
            if not outs:
                self.line(text)
                continue
            self.names[outs[0]] = self.name()
            self.line(f"{self.names[outs[0]]} = {text}")

    def formula(self, name: str, given: list[str], params: dict[str, Any], equation) -> str:
        (out,) = equation.outvars
        shape = list(out.aval.shape)
        if name == "div":
            return f"{given[0]} {'/' if jnp.issubdtype(out.aval.dtype, jnp.floating) else '//'} {given[1]}"
        if name == "neg":
            return f"-{given[0]}"
        if name == "not":
            return f"{given[0]} == 0"
        if name == "square":
            return f"{given[0]} * {given[0]}"
        if name == "select_n":
            return f"tl.where({given[0]}, {given[2]}, {given[1]})"
        if name == "sign":
            return f"tl.where({given[0]} > 0, 1, tl.where({given[0]} < 0, -1, 0))"
        if name == "convert_element_type":
            return (
                f"({given[0]} != 0)"
                if out.aval.dtype == jnp.bool_
                else f"{self.typed(equation.invars[0])}.to(tl.{_TYPES[str(out.aval.dtype)]})"
            )
        if name == "elementwise_inline_asm":
            told = f"[{', '.join(given)}], tl.{_TYPES[str(out.aval.dtype)]}, is_pure=True, pack={params['pack']}"
            return f"tl.inline_asm_elementwise({params['asm']!r}, {params['constraints']!r}, {told})"
        if name == "program_id":
            return f"tl.program_id({params['axis']})"
        if name == "num_programs":
            return f"tl.full([], {self.grid[params['axis']]}, tl.int32)"
        if name in ("reduce_sum", "reduce_max") and len(params["axes"]) == 1:
            return f"tl.{name.removeprefix('reduce_')}({given[0]}, axis={params['axes'][0]})"
        if name == "cumsum" and not params["reverse"]:
            return f"tl.cumsum({given[0]}, {params['axis']})"
        if name == "transpose" and tuple(params["permutation"]) == (1, 0):
            return f"tl.trans({given[0]})"
        if name == "dot_general":
            (((of_a,), (of_b,)), batched) = params["dimension_numbers"]
            if of_a == 1 and batched == ((), ()):
                return f'tl.dot({given[0]}, {given[1] if of_b == 0 else f"tl.trans({given[1]})"}, input_precision="ieee")'
        if name == "iota":
            axis, size = params["dimension"], shape[params["dimension"]]
            index = [":" if i == axis else "None" for i in range(len(shape))]
            ramp = f"tl.arange(0, {size})" if size > 1 else "tl.zeros([1], tl.int32)"
            return ramp if len(shape) == 1 else f"tl.broadcast_to({ramp}[{', '.join(index)}], {shape})"
        if name in ("broadcast_in_dim", "broadcast_to", "reshape", "squeeze", "expand_dims"):
            if not equation.invars[0].aval.shape:
                return f"tl.full({shape}, {given[0]}, tl.{_TYPES[str(out.aval.dtype)]})" if shape else given[0]
            if name == "broadcast_in_dim":
                index = [":" if i in params["broadcast_dimensions"] else "None" for i in range(len(shape))]
                return f"tl.broadcast_to({given[0]}[{', '.join(index)}], {shape})"
            return f"tl.{'broadcast_to' if name == 'broadcast_to' else 'reshape'}({given[0]}, {shape})"
        raise NotImplementedError(f"a kernel's {name} has no text in Triton's language: {equation}")

    # Memory. An index is integers, which broadcast among each other and stand first, and slices.

    def pointer(self, ref, indices, tree) -> str:
        (indexer,) = jax.tree.unflatten(tree, indices)
        return self.pointer_at(ref, indexer)

    def pointer_at(self, ref, indexer) -> str:
        shape, rank = ref.aval.shape, len(indexer.get_indexer_shape())
        wide = ".to(tl.int64)" if math.prod(shape) >= 2**31 else ""
        num_integer_axes, terms = len(indexer.int_indexer_shape), []
        axis = num_integer_axes
        for dimension, index in enumerate(indexer.indices):
            stride = math.prod(shape[dimension + 1 :])
            if hasattr(index, "size") and hasattr(index, "start"):
                start = index.start if isinstance(index.start, int) else self.expression(index.start)
                ramp = f"tl.arange(0, {index.size})" if index.size > 1 else "tl.zeros([1], tl.int32)"
                place = ", ".join(":" if i == axis else "None" for i in range(rank))
                terms.append(f"({start} + {ramp}{wide})[{place}] * {stride * index.stride}")
                axis += 1
            elif isinstance(index, int) or not index.aval.shape:
                text = str(index) if isinstance(index, int) else self.typed(index) + wide
                terms.append(f"{text} * {stride}")
            else:
                place = ", ".join([":"] * num_integer_axes + ["None"] * (rank - num_integer_axes))
                terms.append(f"{self.expression(index)}{wide}[{place}] * {stride}")
        return f"{self.names[ref]} + {' + '.join(terms)}"

    def _get(self, equation) -> None:
        ref, *indices = equation.invars
        (out,) = equation.outvars
        self.names[out] = self.name()
        self.line(f"{self.names[out]} = tl.load({self.pointer(ref, indices, equation.params['tree'])})")

    def _swap(self, equation) -> None:
        ref, stored, *indices = equation.invars
        self.line(f"tl.store({self.pointer(ref, indices, equation.params['tree'])}, {self.typed(stored)})")

    def _masked_load(self, equation) -> None:
        ref, (indexer,), mask, other = jax.tree.unflatten(equation.params["args_tree"], equation.invars)
        masked = "" if mask is None else f", mask={self.expression(mask)}" + ("" if other is None else f", other={self.expression(other)}")
        self.names[equation.outvars[0]] = self.name()
        self.line(f"{self.names[equation.outvars[0]]} = tl.load({self.pointer_at(ref, indexer)}{masked})")

    def _masked_swap(self, equation) -> None:
        ref, (indexer,), stored, mask = jax.tree.unflatten(equation.params["args_tree"], equation.invars)
        masked = "" if mask is None else f", mask={self.expression(mask)}"
        self.line(f"tl.store({self.pointer_at(ref, indexer)}, {self.typed(stored)}{masked})")

    # Control flow.

    def inline(self, program, given: list[str]) -> list[str]:
        jaxpr = getattr(program, "jaxpr", program)
        self.names |= dict(zip(jaxpr.invars, given, strict=True))
        self.write(jaxpr)
        return list(map(self.typed, jaxpr.outvars))

    def _jit(self, equation) -> None:
        outs = self.inline(equation.params["jaxpr"], list(map(self.typed, equation.invars)))
        self.names |= dict(zip(equation.outvars, outs, strict=True))

    _pjit = _jit

    def _cond(self, equation) -> None:
        index, *operands = equation.invars
        if equation.outvars or len(equation.params["branches"]) != 2:
            raise NotImplementedError(f"a conditional with results, or of more than two branches: {equation}")
        for branch, sign in zip(equation.params["branches"], ("==", "!=")):
            if branch.jaxpr.eqns:
                self.line(f"if {self.expression(index)} {sign} 0:")
                self.depth += 1
                self.inline(branch, list(map(self.typed, operands)))
                self.depth -= 1

    def _scan(self, equation) -> None:
        body, number = equation.params["jaxpr"], len(equation.outvars)  # of what it carries: loops over arrays have more, of other shapes
        consts, carry = equation.invars[:-number], equation.invars[-number:]
        if [atom.aval.shape for atom in body.jaxpr.invars] != [atom.aval.shape for atom in equation.invars]:
            raise NotImplementedError(f"a loop over arrays: {equation}")
        length, (first, after) = equation.params["length"], (body.jaxpr.invars[len(consts)], body.jaxpr.outvars[0])
        adds = [each.invars for each in body.jaxpr.eqns if each.primitive.name == "add" and each.outvars[0] is after]
        if adds and adds[0][0] is first and _is_literal(adds[0][1]) and adds[0][1].val == 1:
            start, *carry = carry
            self.loop(equation, body, consts, start, f"{self.expression(start)} + {length}", [], carry)
        else:  # nothing uses the counter: it is left out
            self.loop(equation, body, consts, None, str(length), [], carry)

    def _while(self, equation) -> None:
        params, skipped = equation.params, equation.params["cond_nconsts"]
        consts, carry = equation.invars[skipped:][: params["body_nconsts"]], equation.invars[skipped + params["body_nconsts"] :]
        condition = [each.primitive.name for each in params["cond_jaxpr"].jaxpr.eqns]
        if skipped or condition != ["lt"]:
            raise NotImplementedError(f"a loop that does not count: {equation}")
        start, stop, *carry = carry
        self.loop(equation, params["body_jaxpr"], consts, start, self.expression(stop), [stop], carry)

    def loop(self, equation, body, consts, start, stop: str, fixed: list, carry: list) -> None:
        """Write a loop of `fori_loop`: it carries first the counter, if that has a start, then, where bounds are not static, the end."""
        carried, counts = [self.name("c") for _ in carry], start is not None
        for name, atom in zip(carried, carry, strict=True):
            self.line(f"{name} = {self.typed(atom)}")
        counter, skipped = self.name("i"), counts + len(fixed)
        self.line(f"for {counter} in range({self.expression(start) if counts else 0}, {stop}):")
        self.depth += 1
        given = [*map(self.typed, consts), *[counter] * counts, *map(self.typed, fixed), *carried]
        after = self.inline(body, given)[skipped:]
        temporary = [self.name("t") for _ in after]
        for name, text in (*zip(temporary, after, strict=True), *zip(carried, temporary, strict=True)):
            self.line(f"{name} = {text}")
        self.depth -= 1
        self.names |= dict(zip(equation.outvars[skipped:], carried, strict=True))
