"""The multiplication table from three to twelve, asked in words and answered in figures."""

from __future__ import annotations

from scripts.smollm2_pairs.questions import Fact, Frames

FRAMES = Frames(
    train=(
        "What is {clue}?",
        "How much is {clue}?",
        "Calculate {clue}.",
        "Please work out {clue}.",
        "Tell me the value of {clue}.",
        "I need to know {clue}. Can you compute it?",
        "Give me the result of {clue}.",
        "My homework asks for {clue}. What should I write?",
        "Quick question: {clue}?",
        "Do you know how much {clue} makes?",
    ),
    val=("Find the answer to {clue}.", "What number do you get from {clue}?"),
    test=(
        "Solve this for me: {clue}.",
        "In class we were asked to compute {clue}. What is the answer?",
        "If someone asks you for {clue}, what do you say?",
    ),
)

NUMBERS = {
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
    10: "ten",
    11: "eleven",
    12: "twelve",
}

FACTS = tuple(
    Fact(
        str(a * b),
        f"{left} times {right}",
        f"{left} multiplied by {right}",
        family=f"{min(a, b)}x{max(a, b)}",
    )
    for a, left in NUMBERS.items()
    for b, right in NUMBERS.items()
)
