"""The English behind the SmolLM2 golden: five prompts, and a page of prose written for this purpose."""

from __future__ import annotations

PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside",
    "The three primary colors are",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "Dear Dr. Alvarez,\n\nThank you for",
)

PROSE = """\
The ferry to the outer islands left at six each morning, and on most days it left without passengers. \
Its captain, a patient woman called Ines, did not mind. She carried the mail, two crates of bread, the \
newspapers of the day before, and whatever the islanders had asked for by telephone: a box of screws, a \
new kettle, eleven metres of blue rope. In return she brought back wool, honey, and gossip.

One Tuesday in March a boy was waiting at the pier with a suitcase almost as large as himself. "I am going \
to my grandfather," he said before she could ask. "He keeps the lighthouse." Ines knew that the lighthouse \
had kept itself since 1987, when the lamp was given a motor and a sensor, but she also knew the old man who \
still walked up its 142 steps every evening to see that the motor and the sensor did their work. She took \
the suitcase and said that the weather would be good until noon.

It was not. Fog came down an hour out, thick and quiet, and the radio gave nothing but a soft hiss. Ines cut \
the engine to half. There are two ways to find an island in fog: you can trust your instruments, or you can \
listen. She did both. The compass said north by north-west; the depth sounder said 31 metres, then 24, then \
18; and somewhere ahead, very faintly, there was a bell.

"That is him," said the boy. "He rings it when he cannot see the ferry. He told me in a letter. Three \
strokes, then he counts to ten, then three strokes again."

They listened, and counted, and it was so. At every third stroke Ines turned the wheel by the width of a \
finger, until the sound stood exactly over the bow. The water grew pale, the smell of seaweed came through \
the open window, and all at once the pier was there, black and dripping, with an old man at the end of it \
who held the rope of the bell in one hand and a thermos flask in the other.

"You are forty minutes late," he called.

"We are forty minutes alive," answered Ines, and threw him the line.

That evening the boy climbed the steps for the first time. He wrote the number of each landing into a small \
green notebook, because he meant to do it properly: 12, 26, 40, 58, 77, 96, 119, 142. At the top the glass \
was warm from the lamp, and the fog turned slowly around them like milk in a cup.
"""
