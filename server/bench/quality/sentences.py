"""Texts whose right treatment is known."""

from __future__ import annotations

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Name three colours of the rainbow.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Give me a name for a small black cat.",
    "What do bees make?",
)
"""For a language model. Answers are compared with those of another implementation."""

SPOKEN = (
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells by the sea shore.",
    "Please turn left at the second traffic light.",
    "My train leaves at half past seven in the morning.",
    "The library closes early on Friday afternoon.",
    "We walked along the river until it began to rain.",
    "Could you bring me a glass of cold water?",
    "The old engine stood on the turntable all winter.",
    "He painted the wooden door a deep shade of green.",
    "Nobody knew why the lights went out last night.",
)
"""Ten plain sentences: a voice speaks them, and a transcription hears them."""

PAIRS = (
    # The same thing in other words.
    (4, "A man is playing a guitar.", "Someone plays the guitar."),
    (4, "The children are running in the park.", "Kids run through the park."),
    (4, "How do I reset my password?", "What are the steps to change a forgotten password?"),
    (4, "The film was very boring.", "The movie was really dull."),
    (4, "It is raining heavily outside.", "There is a downpour outside."),
    # The same matter, another statement.
    (3, "A man is playing a guitar.", "A woman is playing the violin."),
    (3, "The children are running in the park.", "A dog is running in the park."),
    (3, "The restaurant serves Italian food.", "This restaurant has good pasta and pizza."),
    (3, "The train to London is late.", "The train from London was cancelled."),
    (3, "She bought a new car.", "He sold his old car."),
    # The same field.
    (2, "The train to London is late.", "My flight leaves in the evening."),
    (2, "The film was very boring.", "The actor won a prize."),
    (2, "She bought a new car.", "The mechanic changed the oil."),
    (2, "It is raining heavily outside.", "The summer has been hot."),
    (2, "The doctor examined the patient.", "The pharmacy sells medicine."),
    # Nothing in common.
    (1, "A man is playing a guitar.", "The stock market fell sharply."),
    (1, "How do I reset my password?", "Penguins live in the southern hemisphere."),
    (1, "The restaurant serves Italian food.", "The theorem was proved in 1994."),
    (1, "The doctor examined the patient.", "The wooden bridge is painted blue."),
    (1, "She bought a new car.", "The choir sang in Latin."),
)
"""How alike two sentences are to a person: 4 is the same meaning, 1 is nothing in common."""

PASSAGES = (
    "A lighthouse is a tower with a bright lamp at the top. It warns ships of rocks and shallow"
    " water, and shows them the way into a harbour. Before there was electricity, a keeper lived"
    " in the tower. Every evening he climbed the stairs and lit the lamp, and he kept it burning"
    " until the morning.",
    "Bread is made of flour, water, salt and yeast. The baker kneads the dough until it is smooth"
    " and leaves it in a warm place. The yeast eats sugar and gives off gas, which makes the dough"
    " rise. After an hour the loaf goes into a hot oven, where its crust turns brown.",
    "Water covers most of the surface of the Earth. The sun warms it, and some of it rises into"
    " the air as vapour. High above the ground the vapour cools and forms clouds. It falls as rain"
    " or snow, runs into streams and rivers, and so returns to the sea.",
    "On Monday morning the manager asked everybody to come to the large meeting room. The company"
    " had sold fewer machines than in the year before, she said, and the new factory would open"
    " three months late. Nobody would lose a job, but for a while there would be no new ones.",
)
"""Plain prose for a language model: how probable it finds each token."""
