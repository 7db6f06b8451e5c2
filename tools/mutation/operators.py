"""Mutations that Cosmic Ray does not have: a statement removed, a condition answered
without evaluation, a lock held for less than its whole block."""

import parso
from cosmic_ray.operators.operator import Example, Operator


def _replaced(node, code):
    """A node of `code` with as many lines as `node`: no line below gets another
    number."""
    lost = node.get_code().count("\n") - code.count("\n")
    return parso.parse(code + "\n" * lost)


class RemoveStatement(Operator):
    """Replace a simple statement by pass, unless the statement is an import, a
    docstring or pass."""

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


class _Answer(Operator):
    """Replaces a condition among the children of a node by a constant answer."""

    questions = {}  # by type of node: the slice of the conditions, and the answer

    def mutation_positions(self, node):
        for question in self.asked(node):
            yield question.start_pos, question.end_pos

    def asked(self, node):
        where, _ = self.questions.get(node.type, (None, None))
        questions = node.children[where] if where else ()
        # The slice may end with the colon of an "else", which is an operator.
        return [q for q in questions if q.type != "operator"]

    def mutate(self, node, index):
        question = self.asked(node)[index]
        prefix = question.get_first_leaf().prefix
        lines = question.get_code(include_prefix=False).count("\n")
        _, answer = self.questions[node.type]
        code = f"({lines * chr(10)}{answer})" if lines else answer
        node.children[node.children.index(question)] = parso.parse(prefix + code)
        return node

    @classmethod
    def examples(cls):
        return []


CONDITIONS = slice(1, None, 4)  # of the node of "if a: ... elif b: ..."
CONDITION = slice(2, 3)  # of the node of "a if b else c"
OPERANDS = slice(None, None, 2)


class SayYes(_Answer):
    """Take a condition for true."""

    questions = {"if_stmt": (CONDITIONS, "True"), "ternary": (CONDITION, "True")}


class SayNo(_Answer):
    """Take a condition for false."""

    questions = {
        "if_stmt": (CONDITIONS, "False"),
        "ternary": (CONDITION, "False"),
        "while_stmt": (slice(1, 2), "False"),
    }


class DropOperand(_Answer):
    """Leave out one operand of "and" or "or"."""

    questions = {"and_test": (OPERANDS, "True"), "or_test": (OPERANDS, "False")}


class _ShortenLock(Operator):
    def mutation_positions(self, node):
        if node.type == "with_stmt" and _is_lock(node.children[1].get_code()):
            if self.is_possible(node.children[3].children[1:]):
                yield node.start_pos, node.children[2].end_pos

    def is_possible(self, statements):
        return len(statements) > 1

    @classmethod
    def examples(cls):
        return []


class RemoveLock(_ShortenLock):
    """Run the block without the lock."""

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


def _is_lock(code):
    return "_lock" in code or "_mutex" in code


def _dedented(code):
    lines = code.splitlines(keepends=True)
    return "".join(line.replace("    ", "", 1) for line in lines)


class Provider(dict):
    """The operators of this module by name, in the form that Cosmic Ray asks for."""

    def __init__(self):
        found = (
            *(RemoveStatement, SayYes, SayNo, DropOperand),
            *(RemoveLock, TakeLockLater, ReleaseLockSooner),
        )
        super().__init__({operator.__name__: operator for operator in found})
