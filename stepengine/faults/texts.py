"""Two stories that a small model can answer questions about, so that a wrong name is seen at once."""

ANNA = (
    "Anna lives in a small house with three pets: the dog is called Max, the parrot is called Rio, and the cat is "
    "called Luna."
)
TOM = (
    "Tom lives in an old house with three pets: the dog is called Bruno, the parrot is called Kiwi, and the cat is "
    "called Tiger."
)
