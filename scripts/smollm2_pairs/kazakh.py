"""Facts of Kazakh culture, each asked for in two ways, with the shortest usual answer.

Kazakh words are spelled as English texts spell them, without diacritics. Both clues of a fact are noun
phrases, so that they fit every frame, and name Kazakhstan or the Kazakhs where another answer were possible.
"""

from __future__ import annotations

from scripts.smollm2_pairs.questions import Fact, Frames

FRAMES = Frames(
    train=(
        "What is {clue}?",
        "Name {clue}.",
        "Tell me {clue}, please.",
        "I am preparing a quiz about Kazakhstan. What is {clue}?",
        "Do you happen to know {clue}?",
        "Give me one answer only: {clue}.",
        "A friend from Almaty talked about {clue}. What did she mean?",
        "{Clue}: what is the answer?",
        "Can you help me with a crossword? I need {clue}.",
        "My guidebook mentions {clue}, but does not say it. Can you?",
    ),
    val=(
        "Which answer is right for {clue}?",
        "I would like to learn about Kazakhstan, first of all {clue}. Please teach me.",
    ),
    test=(
        "Answer as briefly as you can. I am looking for {clue}.",
        "In a lesson on Kazakh culture the teacher asks for {clue}. What do you reply?",
        "Someone wants to know {clue}. How would you answer?",
    ),
)

FOOD = (
    Fact("Kumis", "the Kazakh drink made from fermented mare's milk", "the sour horse milk of the Kazakhs"),
    Fact("Camel", "the animal whose milk becomes Kazakh shubat", "the source of the milk in shubat"),
    Fact(
        "Beshbarmak",
        "the Kazakh dish of boiled meat on wide noodles",
        "the national dish of Kazakhstan, whose name means five fingers",
    ),
    Fact("Baursak", "the Kazakh name of fried puffs of dough", "the round fried bread on a Kazakh tea table"),
    Fact(
        "Sausage", "the kind of food that Kazakhs call kazy", "the English word for Kazakh kazy of horse meat"
    ),
    Fact("Cheese", "the food that Kazakhs dry as kurt", "the milk product in the salty balls called kurt"),
    Fact("Liver", "the main meat in Kazakh kuyrdak", "the organ that Kazakhs fry for kuyrdak"),
    Fact("Sorpa", "the Kazakh name of meat broth", "the broth drunk after meat at a Kazakh meal"),
    Fact(
        "Irimshik", "the dried sweet cottage cheese of the Kazakhs", "the Kazakh yellow curd eaten with tea"
    ),
    Fact("Ayran", "the Kazakh drink of soured cow's milk", "the thin yoghurt drink of Kazakh villages"),
    Fact("Millet", "the grain in the Kazakh sweet zhent", "the cereal that Kazakhs grind for zhent"),
    Fact("Friday", "the day on which Kazakhs fry shelpek", "the weekday of Kazakh flatbread for the dead"),
)

MUSIC = (
    Fact("Dombra", "the two-stringed plucked lute of the Kazakhs", "the best-known Kazakh string instrument"),
    Fact("Kobyz", "the bowed horsehair instrument of Kazakh shamans", "the Kazakh fiddle with two strings"),
    Fact("Seven", "the number of strings on a Kazakh zhetigen", "the number that named the zither zhetigen"),
    Fact(
        "Flute",
        "the kind of instrument that the sybyzgy is",
        "the instrument of the Kazakh shepherd's breath",
    ),
    Fact(
        "Metal",
        "the usual material of a Kazakh shankobyz",
        "the stuff of which the Kazakh mouth harp is made",
    ),
    Fact(
        "Drum", "the kind of instrument that the dauylpaz is", "the instrument on a Kazakh warrior's saddle"
    ),
    Fact("Melody", "the meaning of the Kazakh word kui", "the thing that Kazakh musicians call a kui"),
    Fact("Aitys", "the singing contest of Kazakh poets", "the Kazakh duel of improvised verses"),
    Fact(
        "Akyn", "the Kazakh word for a poet who improvises songs", "the singer in a Kazakh contest of verses"
    ),
    Fact("Epics", "the works that a Kazakh zhyrau recites", "the long poems of the Kazakh zhyrau"),
)

HOLIDAYS = (
    Fact("Nauryz", "the spring new year of the Kazakhs", "the Kazakh holiday of the spring equinox"),
    Fact(
        "March", "the month in which Kazakhs celebrate the equinox", "the month of the Kazakh spring new year"
    ),
    Fact("December", "the month of Kazakhstan's Independence Day", "the month when Kazakhstan left the USSR"),
    Fact("October", "the month of Kazakhstan's Republic Day", "the month when Kazakhs declared sovereignty"),
    Fact("July", "the month of Kazakhstan's Capital Day", "the month in which Astana celebrates its day"),
    Fact("Kurban Ait", "the Kazakh name of the Feast of Sacrifice", "the name of Eid al-Adha in Kazakhstan"),
    Fact("Oraza Ait", "the Kazakh feast that ends Ramadan", "the name of Eid al-Fitr in Kazakhstan"),
)

HOME = (
    Fact("Felt", "the cover of a Kazakh yurt", "the wool cloth on a Kazakh nomad's tent"),
    Fact(
        "Emblem",
        "the state symbol of Kazakhstan with a shanyrak",
        "the place of the yurt's top in Kazakh heraldry",
    ),
    Fact(
        "Wall", "the part of the yurt that Kazakhs call kerege", "the place of the lattice in a Kazakh yurt"
    ),
    Fact("Uyk", "the Kazakh word for a roof pole of the yurt", "the curved pole under a Kazakh tent's crown"),
    Fact("Tor", "the seat of honour in a Kazakh yurt", "the guest's place opposite a Kazakh tent's door"),
    Fact("Carpet", "the thing that Kazakhs call a syrmak", "the use of a quilted Kazakh syrmak"),
    Fact("Dastarkhan", "the Kazakh word for a table laid for guests", "the spread cloth of a Kazakh feast"),
    Fact("Cradle", "the thing that Kazakhs call a besik", "the furniture of a Kazakh baby, the besik"),
    Fact("Torsyk", "the leather flask of Kazakh riders", "the Kazakh traveller's bottle of skin"),
    Fact(
        "Horse skin", "the material of the Kazakh vessel saba", "the stuff of the bag in which kumis ripens"
    ),
    Fact("Village", "the meaning of the Kazakh word aul", "the kind of place that Kazakhs call an aul"),
    Fact(
        "Summer",
        "the season of the Kazakh pasture zhailau",
        "the time when Kazakh herders live on the zhailau",
    ),
    Fact("Winter", "the season of the Kazakh camp kystau", "the time when Kazakh herders live in the kystau"),
)

CLOTHES = (
    Fact("Saukele", "the tall headdress of a Kazakh bride", "the pointed wedding hat of Kazakh women"),
    Fact("Robe", "the garment that Kazakhs call a shapan", "the kind of clothing that a Kazakh shapan is"),
    Fact("White", "the colour of a Kazakh matron's kimeshek", "the usual colour of the Kazakh hood kimeshek"),
    Fact("Fur", "the material of the Kazakh winter hat tymak", "the stuff that makes a Kazakh tymak warm"),
    Fact("Waistcoat", "the garment that Kazakh women call kamzol", "the English word for a Kazakh kamzol"),
)

GAMES = (
    Fact("Goat", "the animal in the Kazakh game kokpar", "the carcass for which Kazakh riders fight"),
    Fact("Girl", "the person chased in the Kazakh game kyz kuu", "the one with the whip in Kazakh kyz kuu"),
    Fact("Nine", "the number of pebbles in a togyzkumalak hole", "the number in the name togyzkumalak"),
    Fact(
        "Sheep",
        "the animal whose bones are Kazakh asyks",
        "the source of the bones in a Kazakh children's game",
    ),
    Fact("Baiga", "the long-distance horse race of the Kazakhs", "the Kazakh race across the open steppe"),
    Fact("Audaryspak", "the Kazakh wrestling on horseback", "the Kazakh sport of pulling riders from horses"),
    Fact("Six", "the number of poles of a Kazakh altybakan", "the number in the name of the swing altybakan"),
    Fact("Dog", "the animal that Kazakhs call a tazy", "the kind of hunter that the Kazakh tazy is"),
    Fact("Eagle", "the bird of a Kazakh burkitshi", "the bird below the sun on Kazakhstan's flag"),
)

PEOPLE = (
    Fact(
        "Abai",
        "the name of the Kazakh poet of the Book of Words",
        "the name of the founder of written Kazakh literature",
    ),
    Fact(
        "Auezov",
        "the name of the Kazakh author of The Path of Abai",
        "the name of the novelist who told Abai's life",
    ),
    Fact(
        "Altynsarin",
        "the name of the teacher who opened the first Kazakh schools",
        "the name of the author of the first Kazakh reading book",
    ),
    Fact(
        "Valikhanov", "the name of the Kazakh explorer of Kashgar", "the name of Dostoevsky's Kazakh friend"
    ),
    Fact(
        "Kurmangazy",
        "the name of the composer of the Kazakh piece Saryarka",
        "the name that the Kazakh folk orchestra bears",
    ),
    Fact(
        "Baitursynov",
        "the name of the reformer of the Kazakh Arabic alphabet",
        "the name of the founder of Kazakh linguistics",
    ),
    Fact(
        "Korkyt",
        "the name of the legendary inventor of the kobyz",
        "the name of the sage who fled death in Kazakh legends",
    ),
    Fact(
        "Esenberlin",
        "the name of the Kazakh author of The Nomads",
        "the name of the writer of a trilogy on the Kazakh Khanate",
    ),
    Fact(
        "Suleimenov",
        "the name of the Kazakh author of Az i Ya",
        "the name of the poet who led Kazakhstan's antinuclear movement",
    ),
    Fact(
        "Tauke",
        "the name of the khan who gave the Kazakhs Zhety Zhargy",
        "the name of the Kazakh khan of the seven charters",
    ),
    Fact(
        "Ablai",
        "the name of the Kazakh khan between Russia and Qing China",
        "the name of the khan of all Kazakhs from 1771",
    ),
    Fact(
        "Kenesary",
        "the name of the last khan of the Kazakhs",
        "the name of the leader of the Kazakh revolt of 1837",
    ),
    Fact(
        "Tole bi",
        "the name of the great judge of the Kazakh Senior Zhuz",
        "the name of the wise biy of the Kazakh Great Horde",
    ),
    Fact(
        "1465",
        "the year when the Kazakh Khanate was founded",
        "the year in which Kerei and Zhanibek's state began",
    ),
)

PLACES = (
    Fact("Turkistan", "the Kazakh city of Yasawi's mausoleum", "the old pilgrim city of southern Kazakhstan"),
    Fact(
        "Aktau", "the main Kazakh port on the Caspian Sea", "the main city of Kazakhstan's Mangystau region"
    ),
    Fact("Semey", "the Kazakh name of Semipalatinsk", "the Kazakh city near the nuclear test site"),
    Fact("Oskemen", "the Kazakh name of Ust-Kamenogorsk", "the main city of East Kazakhstan"),
    Fact("Medeu", "the mountain ice rink above Almaty", "the high skating stadium of Kazakhstan"),
    Fact("Khan Tengri", "the highest mountain of Kazakhstan", "the marble peak on Kazakhstan's border"),
    Fact("Charyn", "the red canyon east of Almaty", "the river canyon with Kazakhstan's Valley of Castles"),
    Fact(
        "Balkhash", "the Kazakh lake that is half fresh and half salt", "the lake that Kazakhstan's Ili feeds"
    ),
    Fact("Esil", "the river of Kazakhstan's capital", "the Kazakh name of the river Ishim"),
    Fact(
        "Kaindy", "the Kazakh lake with a sunken forest", "the lake of drowned spruces in southern Kazakhstan"
    ),
    Fact("Tenge", "the currency of Kazakhstan", "the money with which people pay in Kazakhstan"),
    Fact("Yellow", "the colour of the sun on Kazakhstan's flag", "the second colour of the Kazakh flag"),
    Fact("Tiyn", "the hundredth part of Kazakhstan's currency", "the small coin of Kazakhstan"),
)

FAMILY = (
    Fact("Grandmother", "the meaning of the Kazakh word azhe", "the relative whom Kazakh children call azhe"),
    Fact("Father", "the meaning of the Kazakh word ake", "the relative whom Kazakh children call ake"),
    Fact("Younger brother", "the meaning of the Kazakh word ini", "the relative whom a Kazakh man calls ini"),
    Fact("Elder sister", "the meaning of the Kazakh word apke", "the relative whom Kazakhs call apke"),
    Fact("Bride", "the meaning of the Kazakh word kelin", "the new family member whom Kazakhs call kelin"),
    Fact("Grandchild", "the meaning of the Kazakh word nemere", "the relative whom old Kazakhs call nemere"),
    Fact("Mother", "the parent of a Kazakh's nagashy kin", "the side of a Kazakh family called nagashy"),
    Fact("Brother-in-law", "the meaning of the Kazakh word zhezde", "the relative whom Kazakhs call zhezde"),
)

CUSTOMS = (
    Fact("Good news", "the reason for a Kazakh suyinshi gift", "the thing that Kazakhs reward with suyinshi"),
    Fact(
        "Sweets", "the things that Kazakhs throw as shashu", "the shower at a Kazakh wedding, called shashu"
    ),
    Fact(
        "Walking",
        "the skill that Kazakhs honour with tusau kesu",
        "the new art of a child at Kazakh tusau kesu",
    ),
    Fact(
        "Face", "the part of the bride shown at betashar", "the thing uncovered in the Kazakh rite betashar"
    ),
    Fact(
        "Present", "the thing that Kazakhs call korimdik", "the thing given at a first look at a Kazakh bride"
    ),
    Fact("Blessing", "the meaning of the Kazakh word bata", "the words of a Kazakh elder, called bata"),
    Fact("Groom", "the payer of the Kazakh kalym", "the young man whose family gives the kalym"),
    Fact("Three", "the number of Kazakh zhuzes", "the number of hordes into which Kazakhs were divided"),
)

FACTS = (
    *FOOD,
    *MUSIC,
    *HOLIDAYS,
    *HOME,
    *CLOTHES,
    *GAMES,
    *PEOPLE,
    *PLACES,
    *FAMILY,
    *CUSTOMS,
)
