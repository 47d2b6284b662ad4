"""What is continued when nobody says what: beginnings of stories, articles and programs."""

TEXTS = (
    "Once upon a time there was a little",
    "def read(self, size=-1):\n    return self.",
    "The city lies on the river and was",
    "import os\nimport sys\n\nclass ",
    "She looked at the dog and said,",
    "for name, value in items.items():\n    if ",
    "In the second half of the year the",
    "They were very happy because the sun",
)
