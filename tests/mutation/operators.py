"""What Cosmic Ray does not do to a program: statements left out, and locks held
for less than all of a block."""

import parso
from cosmic_ray.operators.operator import Example, Operator


def _replaced(node, code):
    """The code in the node's place. The lines below keep their numbers."""
    lost = node.get_code().count("\n") - code.count("\n")
    return parso.parse(code + "\n" * lost)


class RemoveStatement(Operator):
    """Leave out a statement that is no import, docstring or pass."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt":
            first = node.children[0]
            if first.type not in ("import_name", "import_from", "string"):
                if first.get_code(include_prefix=False) not in ("pass", "..."):
                    yield first.start_pos, first.end_pos

    def mutate(self, node, index):
        prefix = node.get_first_leaf().prefix
        return _replaced(node, f"{prefix}pass\n")

    @classmethod
    def examples(cls):
        return [Example("a = 1\nb = 2\n", "pass\nb = 2\n")]


class _ShortenLock(Operator):
    def mutation_positions(self, node):
        if node.type == "with_stmt" and "_lock" in node.children[1].get_code():
            if self.is_possible(node.children[3].children[1:]):
                yield node.start_pos, node.children[2].end_pos

    def is_possible(self, statements):
        return len(statements) > 1

    @classmethod
    def examples(cls):
        return []


class RemoveLock(_ShortenLock):
    """Do without the lock."""

    def is_possible(self, statements):
        return True

    def mutate(self, node, index):
        prefix = node.get_first_leaf().prefix
        body = node.children[3].get_code()
        return _replaced(node, f"{prefix}if True:{body}")


class TakeLockLater(_ShortenLock):
    """Take the lock after the first statement of its block."""

    def mutate(self, node, index):
        newline, first, *rest = (
            child.get_code() for child in node.children[3].children
        )
        head = "".join(child.get_code() for child in node.children[:3])
        return _replaced(node, _dedented(first) + head + newline + "".join(rest))


class ReleaseLockSooner(_ShortenLock):
    """Release the lock before the last statement of its block."""

    def mutate(self, node, index):
        *body, last = (child.get_code() for child in node.children[3].children)
        head = "".join(child.get_code() for child in node.children[:3])
        return _replaced(node, head + "".join(body) + _dedented(last))


def _dedented(code):
    lines = code.splitlines(keepends=True)
    return "".join(line.replace("    ", "", 1) for line in lines)


class Provider(dict):
    """Finds the operators above by their names, as Cosmic Ray asks for them."""

    def __init__(self):
        found = (RemoveStatement, RemoveLock, TakeLockLater, ReleaseLockSooner)
        super().__init__({operator.__name__: operator for operator in found})
