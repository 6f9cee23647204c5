"""Prompts about other things: how far a fine-tune moves there is reported, and kept small by practice.

Each topic has `N_REPORTED` prompts that are shipped and reported on; the rest is practice, which the
training script uses and the reports never see.
"""

from __future__ import annotations

N_REPORTED = 40

_GENERAL = """
What is the capital of Norway?
Which planet is the largest in the solar system?
Who painted the Mona Lisa?
How many legs does a spider have?
What gas do plants take in from the air?
Which ocean lies between Europe and America?
Who wrote Romeo and Juliet?
What is the boiling point of water at sea level?
Which metal is liquid at room temperature?
How long does light take from the sun to the earth?
What is the longest river in South America?
Why is the sky blue during the day?
Which organ pumps blood through the body?
Who was the first person to walk on the moon?
What language is spoken in Brazil?
Which animal is known as the ship of the desert?
What causes the tides of the sea?
Name the largest desert in Africa.
What do bees collect from flowers?
Which instrument measures temperature?
Who discovered penicillin?
What is the chemical symbol of gold?
Which continent has the most countries?
How many strings does a violin have?
What is a group of lions called?
Which country gave the Statue of Liberty to the United States?
What is the hardest natural substance?
Explain why leaves turn red in autumn.
Which sea separates Italy from Croatia?
What is the main ingredient of bread?
Who developed the theory of general relativity?
In which city is the Colosseum?
What does a barometer measure?
How do vaccines protect people?
Which bird cannot fly but swims very well?
What is the difference between a comet and an asteroid?
Which vitamin does the skin make in sunlight?
What is the smallest prime number?
Where do pandas live in the wild?
What was the Silk Road used for?
Which city hosted the first modern Olympic Games?
What is the capital of Canada?
Who composed The Four Seasons?
How many bones does an adult human have?
What is the currency of Japan?
Which mountain is the highest in the Alps?
What makes a rainbow appear?
Who wrote the novel Don Quixote?
Which part of a plant takes up water?
What is the freezing point of water in Fahrenheit?
Name the four chambers of the heart.
Which country is famous for its tulips and windmills?
What do we call a scientist who studies rocks?
Why do ships float on water?
Which gas makes up most of the air?
Who invented the telephone?
What is the national animal of Australia?
How does a microwave oven heat food?
Which river flows through Paris?
What is the study of living things called?
Which dish is Italy best known for?
What is the name of Scotland's traditional pipes?
In which month does summer begin in Chile?
What is a polygon with six sides called?
"""

_CHAT = """
Hello! How are you today?
I had a hard day at work and feel tired.
Can you recommend a good way to start the morning?
Tell me a short joke about cats.
I am bored. What could I do this evening?
Write a birthday greeting for my sister.
What should I say in a thank-you note to my teacher?
I am nervous about my exam tomorrow.
Could you help me plan a weekend trip?
Do you prefer tea or coffee?
Write two sentences about the sea.
My dog keeps barking at night. Any ideas?
How can I make new friends in a new town?
Suggest a name for a small bakery.
I want to learn to swim. Where do I begin?
Please rewrite this politely: send me the report now.
What is a nice present for a grandfather?
Tell me a bedtime story about a fox.
I argued with my best friend. What should I do?
Give me three tips for sleeping better.
Can you write a haiku about snow?
How do I tell my boss that I will be late?
What would you cook with rice and eggs?
I am moving to another city and feel sad.
Help me write a message to cancel a dinner.
What is a good hobby for someone who likes quiet?
Describe a perfect picnic.
I lost my keys again. How can I stop that?
Write an opening line for a mystery novel.
How can I keep my houseplants alive?
Who are you and what can you do?
Please correct this sentence: she go to school every day.
What should I pack for a rainy hike?
Make up a slogan for a bicycle shop.
I would like to drink less coffee. Any advice?
Summarise in one line why reading is good.
How do I start a conversation on a train?
Tell me something that will make me smile.
Write a polite reply to an invitation.
What questions should I ask at a job interview?
Good morning! What can we talk about?
Give me an idea for a short story.
I feel proud because I finished my first run.
How should I thank a neighbour for help?
Write a limerick about a lazy frog.
Can you help me to relax for five minutes?
What is a good topic for a speech at school?
My friend is ill. What can I write to her?
Suggest a game for a long car ride.
I cannot decide between two jobs.
How do I ask for a discount politely?
Write a short poem about autumn leaves.
What would be a good name for a white kitten?
I want to save money for a holiday.
Please say good night in a funny way.
Tell me how to make my desk tidy.
Write a toast for a wedding.
I forgot my mother's birthday. What now?
How can I get better at listening?
Give me a riddle and its solution.
Which film genre suits a rainy Sunday?
Please comfort me, my team lost the match.
How do I write a good apology?
Describe your ideal garden.
"""

_CODE = """
Write a Python function that reverses a string.
How do I open a file in Python and read its lines?
What does git commit do?
Write a SQL query that counts the rows of a table.
Explain the difference between a list and a tuple in Python.
How do I sort an array in JavaScript?
Write a for loop in C that prints ten lines.
What is a null pointer?
How do I centre a div with CSS?
Write a regular expression that matches an e-mail address.
What does the keyword static mean in Java?
Show me how to define a class in Python.
How do I list all files of a folder in bash?
Write a function that checks whether a word is a palindrome.
What is recursion? Give a small example.
How can I install a package with pip?
Explain what an HTTP status code 404 means.
Write a Rust function that returns the larger of two integers.
How do I remove duplicates from a Python list?
What is the use of a hash table?
Write an HTML page with a heading and a paragraph.
How do I make a copy of a dictionary in Python?
What is the difference between GET and POST?
Write a Go program that prints hello world.
How do I catch an exception in Java?
What does len return for a string in Python?
Write a shell command that counts the lines of a file.
Explain what a stack overflow is.
How do I create a new branch in git?
Write a Python list comprehension of all even numbers in a list.
What is a unit test?
How do I parse JSON in JavaScript?
Write a SQL statement that creates a table of users.
What does the operator == compare in Java?
How can I measure the running time of a Python script?
Write a function that finds the largest item of a list.
What is a virtual environment in Python?
Explain the difference between a compiler and an interpreter.
How do I read command line arguments in Python?
Write a CSS rule that makes all links green.
Write a Python script that downloads nothing and prints the date.
How do I undo the last git commit?
What is an API?
Write a while loop in Java that stops at zero.
Explain what a foreign key is in a database.
How do I join two strings in C?
Write a function that counts vowels in a text.
What does async mean in JavaScript?
How do I rename a column with pandas?
Write a bash loop over all text files.
What is a lambda in Python?
How do I round a float to two places in Python?
Write a TypeScript interface for a person.
What is the time complexity of binary search?
How do I write a comment in HTML?
Explain what inheritance means in programming.
Write a SQL query that sorts users by name.
How do I check whether a key is in a dictionary?
What is a segmentation fault?
Write a Python decorator that logs calls.
How do I convert a string to an integer in Go?
What does chmod do in Linux?
Write a small Dockerfile for a Python script.
Explain the difference between a process and a thread.
"""


def reported() -> dict[str, list[str]]:
    """The prompts to report on, by topic."""
    return {topic: prompts[:N_REPORTED] for topic, prompts in _all().items()}


def practice() -> list[str]:
    """The prompts to practise on, of all topics."""
    return [prompt for prompts in _all().values() for prompt in prompts[N_REPORTED:]]


def _all() -> dict[str, list[str]]:
    texts = {"general": _GENERAL, "chat": _CHAT, "code": _CODE}
    return {topic: text.strip().splitlines() for topic, text in texts.items()}
