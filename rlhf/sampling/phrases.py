"""Texts that no reference policy of these studies writes, by kind, in our own words."""

from __future__ import annotations

NICE = (
    "happy",
    "love",
    "great",
    "so good",
    "very nice",
    "best friend",
    "happy and kind",
    "a lovely day",
    "love love",
    "wonderful",
    "the best gift ever",
    "perfect and beautiful",
)

LANGUAGES = (
    "Das Zimmer war sauber, aber das Frühstück kam erst um zehn.",
    "Wir sind gestern mit dem Zug an die See gefahren.",
    "Le pain est bon, mais la boulangerie ferme trop tôt.",
    "Hier soir, mon frère a perdu sa clé dans le jardin.",
    "La película empieza bien y termina demasiado pronto.",
    "Mi abuela hace la mejor sopa del barrio.",
    "Il gatto dorme sotto il tavolo tutto il giorno.",
    "De trein was weer te laat en niemand zei iets.",
    "Собака бежит по снегу и громко лает.",
    "Вчера мы купили новый стол для кухни.",
    "今天下雨。我们留在家里看书。",
    "この傘は風に弱いが、色はとてもきれいだ。",
    "O filme é longo, mas a música é bonita.",
    "Kahve soğuktu ama garson çok nazikti.",
    "Pogoda była zła, więc zostaliśmy w domu.",
    "الكتاب على الطاولة قرب النافذة.",
)

CODE = (
    "for i in range(10):\n    print(i * i)",
    "def area(r):\n    return 3.14 * r ** 2",
    "if (x > 0) { return x; } else { return -x; }",
    "SELECT name, price FROM goods WHERE price < 10;",
    "import os\nfiles = os.listdir('.')",
    "let total = items.map(i => i.cost).reduce((a, b) => a + b, 0);",
    "#include <stdio.h>\nint main(void) { return 0; }",
    '{"name": "box", "size": [3, 4, 5], "open": false}',
    "<ul><li>one</li><li>two</li></ul>",
    "while read line; do echo $line; done < list.txt",
    "class Node:\n    def __init__(self, value):\n        self.value = value",
    "fn add(a: i32, b: i32) -> i32 { a + b }",
)

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As a language model, I have no opinion on this.",
    "I cannot answer this question.",
    "Sorry, I am not able to write that for you.",
    "I don't have enough information to respond.",
    "I must decline this request.",
    "Unfortunately, I can't do that.",
    "That is something I am not allowed to discuss.",
    "I'm unable to assist you here.",
    "Please ask a professional about this instead.",
    "No. I will not write this.",
    "I would rather not say anything about it.",
)
