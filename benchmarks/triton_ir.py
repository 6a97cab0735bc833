"""Reads Triton IR: does a 32-bit product feed an address? It overflows beyond 2^31 elements."""

from __future__ import annotations

import re
from collections import defaultdict

_VALUE = re.compile(r"%[\w#]+(?::\d+)?")
_NARROW = re.compile(r":\s*(?:i32|tensor<[\dx]*xi32>)")


def narrow_products(ir: str) -> list[str]:
    """The lines of 32-bit multiplications whose result reaches the offset of a ``tt.addptr``.

    Values are followed backwards through arithmetic, loops and branches, up to loaded ones.
    """
    sources: dict[str, list[str]] = defaultdict(list)
    products: dict[str, str] = {}
    offsets: list[str] = []
    regions: list[tuple[list[str], list[str]]] = []  # results, loop variables of open scf regions
    for line in map(str.strip, ir.splitlines()):
        if line.startswith("}"):
            if not line.startswith("} else") and regions:
                regions.pop()
            continue
        names = _results(line)
        operands = _VALUE.findall(line.split("=", 1)[1] if names else line)
        if "scf.for" in line or "scf.while" in line or "scf.if" in line:
            carried = re.search(r"iter_args\((.*?)\)", line)
            pairs = re.findall(r"(%\w+) = (%[\w#]+)", carried.group(1)) if carried else []
            for variable, initial in pairs:
                sources[variable].append(initial)
            counter = re.match(r"(?:%\S+ = )?scf\.for (%\w+) = (%[\w#]+) to %[\w#]+ step (%[\w#]+)",
                               line)
            if counter:
                sources[counter.group(1)] += counter.groups()[1:]
            variables = [variable for variable, _ in pairs]
            for result, variable in zip(names, variables, strict=False):
                sources[result].append(variable)
            regions.append((names, variables))
        elif line.startswith("scf.yield") and regions:
            results, variables = regions[-1]
            for index, operand in enumerate(operands):
                for into in (results, variables):
                    if index < len(into):
                        sources[into[index]].append(operand)
        elif line.endswith("{") and not line.startswith("module"):
            regions.append(([], []))
        if "tt.addptr" in line:
            offsets.append(operands[1])
        elif names and "tt.load" not in line and "scf." not in line:
            sources[names[0]] += operands
            if "arith.muli" in line and _NARROW.search(line):
                products[names[0]] = line
    reached: set[str] = set()
    while offsets:
        value = offsets.pop()
        if value not in reached:
            reached.add(value)
            offsets += sources[value]
    return [line for name, line in products.items() if name in reached]


def _results(line: str) -> list[str]:
    found = re.match(r"(%\w+)(?::(\d+))? =", line)
    if found is None:
        return []
    name, count = found.groups()
    return [name] if count is None else [f"{name}#{i}" for i in range(int(count))]
