"""Plots of the stories.

`{word}` is a member of the cast, a prop or a phrase, `{Word}` the same capitalised, `{a:word}` the same with its
article, and `[this|that]` a choice. The cast: the hero (`hero`, `he`, `him`, `his`, `kind`), a friend of the other sex,
so that pronouns stay clear (`friend`, `he2`, `him2`, `his2`, `kind2`), and an `elder` (`he3`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A plot: the paragraphs of a template; `props` names the columns of `rows`, of which a story uses one row."""

    text: str
    props: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ((),)


LOST = Plot("""
{open} {He} had {a:thing}. [It was the best thing {he} had.|{He} took it everywhere.|{He} loved it very much.]

{day}, {hero} went to {place} to play. When {he} came home, the {thing} was gone! "Oh no! Where is my {thing}?" {he}
[cried|said]. {He} looked {spot}. {He} looked {spot2}. It was not there. {unhappy}

{meet} {ask} {friend}. "I lost my {thing}," said {hero}. "[Do not worry|Do not cry|It will be all right]. I will help
you," said {friend}. "Let us go back to {place} and look [together|again]."

They looked [high and low|here and there|everywhere]. At last, {friend} saw something [shine|move a little|small] in
the [grass|corner|shadow]. It was the {thing}! {thanks} From that day on, {hero} always put the {thing} in a safe
place. [And {he} knew that it is easier to look with a friend.|{hero} learned to take care of the things {he} loved.]
""")

SHARING = Plot("""
{open}[ {habit}|] {day}, {elder} gave {him} a [big bag|basket|box] of {goods}. "[Remember to share|These are for you
and your friends]," said {elder}.

{hero} [took|carried] the {goods} to {place}. {meet} "[Oh, what nice {goods}!|I love {goods}!] May I have some?" asked
{friend}. {hero} held them tight. "No! They are all mine," {he} said. {friend} looked down and walked away.

{hero} sat alone with the {goods}. But it was [not fun|quiet and boring] to be alone. {hero} thought about the sad
face of {friend}. {He} felt bad. So {he} ran after {him2}. "I am sorry, {friend}. [Please take some|Half of them are
for you]," said {hero}.

{friend} [smiled|was very happy]. "Thank you! Now we can both have fun," {he2} said. {together} [{hero} learned that
sharing makes everything better.|{hero} was glad, because {goods} are better with a friend.|From then on, {hero}
always shared.]
""")

FEAR = Plot(
    """
{open}[ {habit}|] {hero} was afraid of {fear}. [{He} did not tell anyone about it.|It made {his} legs shake.|{He}
always ran away from it.]

{day}, {friend}, {a:kind2}, [asked {him} to play|came to visit]. "{invite}" said {friend}. {hero} shook {his} head. "I
cannot. I am [too scared|afraid]," {he} said in a small voice.

"I was afraid once too," said {friend}. "[Take my hand|Stay close to me] and we will try it together. We can stop when
you want." {hero} took a deep breath. Slowly, {he} {face}. [One, two, three!|{His} heart beat fast.] And nothing bad
happened. {truth}

"[You did it!|See? You are so brave!]" said {friend}. {glad} [Being brave means to try, even when you are
scared.|After that, {hero} was not afraid of {fear} anymore.|"I am glad that I tried," said {hero}.]
""",
    ("fear", "invite", "face", "truth"),
    (
        ("the dark", "Let us go and look at the stars!", "stepped out into the dark", "The night was soft and quiet."),
        ("deep water", "Come and play in the water!", "put one foot in the water", "The water was cool and nice."),
        ("thunder", "Let us watch the storm!", "looked out at the storm", "The thunder was only a big noise."),
        ("high places", "Let us climb up and see far away!", "went up, step by step", "From the top, {he} saw it all."),
        ("the big dog", "Come and meet the big dog!", "held out a hand to the dog", "The dog only wagged its tail."),
        ("the wind", "Let us fly a kite!", "walked out into the wind", "The wind only wanted to play."),
        ("the old cave", "Let us see what is in the cave!", "looked into the cave", "There was only a sleepy bat."),
        ("spiders", "Come and see this tiny spider!", "looked at the spider", "It was busy with its pretty web."),
    ),
)

RESCUE = Plot(
    """
{open}[ {habit}|] {day}, {hero} was walking {at_place} when {he} heard a [small|tiny|soft] voice. "Help! Please help
me!" it said.

{hero} looked around and saw {a:creature}. It was stuck {trap}. "[Do not be afraid|Stay still], I will get you out,"
said {hero}. {He} pulled and pulled, but {he} was not strong enough.

So {hero} [ran to get|called] {friend}, {a:kind2}. "I have an idea," said {friend}. "We can use {tool}." They worked
together and {action}. [Pop! The|At last, the] {creature} was free!

"Thank you, {hero}! Thank you, {friend}!" said the {creature}. {reward} {glad} [{hero} learned that two friends can do
what one cannot.|It feels good to help someone small.|From that day on, the three of them were friends.]
""",
    ("trap", "tool", "action"),
    (
        ("under a heavy branch", "a long stick", "pushed the branch up"),
        ("in the thick mud", "a strong rope", "pulled very slowly"),
        ("in an old net", "a sharp stone", "cut the net"),
        ("in a deep hole", "a long board", "made a bridge to the top"),
        ("in a thorny bush", "a big blanket", "held the thorns back"),
        ("between two rocks", "a thick stick", "moved one of the rocks"),
        ("in a sticky web", "a thin stick", "pulled the web apart"),
    ),
)

SKILL = Plot("""
{open}[ {habit}|] There was one thing {he} wanted more than anything. {hero} wanted to {skill}.

{day}, {he} tried for the first time. It did not go well. {hero} [fell down with a bump|got it all wrong|made a big
mess]. [Some of the others laughed.|{He} tried again, and it was even worse.] "I will never {skill}," said {hero}.
{unhappy}

{Elder} came and sat next to {him}. "[I could not do it at first, either|Nobody can do it the first time]," said
{elder}. "Try a little every day." So {hero} tried on Monday. {He} tried on Tuesday. {He} tried [all week|every single
day], even when it [rained|was hard|was cold].

Then, one {weather} morning, it worked! "Look at me! I can {skill}!" {hero} [shouted|called|cried]. {Elder} clapped.
"I am so proud of you," {he3} said. {glad} [{hero} learned that hard things take time.|{He} was glad that {he} did not
give up.|And the next day, {he} showed {his} friend {friend} how to do it, too.]
""")

TRUTH = Plot("""
{open}[ {habit}|] {Elder} had {a:fragile}. It was very [old|pretty|special]. "Please do not play near it," said
{elder}.

{day}, {hero} forgot. {He} was [running|jumping|playing] inside with {a:thing}. Crash! The {fragile} fell down and
broke. "Oh no!" whispered {hero}. {He} hid the pieces {spot}. {His} tummy felt [funny|heavy|bad] all day.

{meet} "What is wrong?" {he2} asked. {hero} told {him2} everything. "You should tell the truth," said {friend}. So
{hero} went to {elder}. "I broke the {fragile}. I am [very sorry|so sorry]," {he} said.

{Elder} was quiet for a moment. Then {he3} smiled. "[I am sad about the {fragile}|It was only {a:fragile}], but I am
happy that you told me the truth," {he3} said. They fixed it together with glue. {hero} felt [better|much better|light
again]. [{He} learned that it is best to tell the truth.|After that, {hero} always told the truth, even when it was
hard.]
""")

WEATHER_TURN = Plot(
    """
{open} {His} best friend was {friend}, {a:kind2}. {day}, they wanted to go to {place} and [have a picnic|play all
day|look for treasure]. [They were very excited.|They could not wait.] {hero} packed some {goods} and {a:thing}.

But on the way, {turn} "Oh no! Our day is ruined," said {hero}. {unhappy} [They waited and waited, but nothing
changed.|They looked at each other and did not know what to do.]

"[Wait, I have an idea|Do not be sad]," said {friend}. "{idea}" "[What a good idea!|Can we really do that?]" said
{hero}. So the two friends {play}. [It was even more fun than they had hoped.|They laughed so hard that their faces
hurt.|It was the best day ever.]

When they got home, {elder} asked, "Did you have a bad day?" "No!" said {hero}. "[We had a great day!|It was the best
day!]" {Elder} [laughed|smiled]. [{hero} learned that a bad day can become a good one.|Sometimes a new plan is better
than the old one.|A good friend can make any day sunny.]
""",
    ("turn", "idea", "play"),
    (
        ("it started to rain.", "We can jump in the puddles!", "jumped from puddle to puddle"),
        ("dark clouds came and it rained hard.", "Let us make boats and race them!", "raced little boats in the rain"),
        ("a strong wind began to blow.", "Let us throw leaves and watch them fly!", "made the leaves fly like birds"),
        ("snow began to fall.", "Let us build a tower out of snow!", "built a tall white tower"),
        ("a thick fog came, and they could not see.", "Let us play that we are ghosts!", "played ghosts in the fog"),
        ("the bridge was broken.", "Let us make a camp right here!", "made a camp out of sticks and a blanket"),
        ("they lost the way.", "Let us play explorers and make a map!", "drew a map and gave every hill a name"),
        ("the path was full of mud.", "Let us make mud cakes!", "made ten big mud cakes"),
    ),
)

NEW_FRIEND = Plot("""
{open}[ {habit}|] {day}, {hero} went to {place}. There {he} saw someone new, {a:kind2} named {friend}. {friend} sat
all alone and looked at the ground.

{hero} wanted to say hello, but {he} felt [shy|a little shy]. "What if {he2} does not like me?" {he} thought. Then
{he} remembered the words of {elder}: "[Just smile and say your name|A kind word is never wrong]." So {hero} walked
over. "Hello, I am {hero}. I like to {hobby}. Do you want to play with me?" {he} asked.

{friend} looked up. "[I do not know any games|I am new here and have no friends]," {he2} said softly. "That is all
right. I will show you," said {hero}. First, they played together. Then {hero} gave {him2} some {goods}. Soon {friend}
began to [laugh|smile].

"[Can we play again tomorrow?|Will you be my friend?]" asked {friend}. "Yes, yes!" said {hero}. {together} [{hero}
learned that one kind word can make a friend.|And {friend} was never lonely again.|A new friend is like a gift.]
""")

FORBIDDEN = Plot(
    """
{open}[ {habit}|] Every morning, {elder} said, "[You may play anywhere|Have fun], but do not go {danger}. It is not
safe."

{day}, {hero} was bored. "I will only take a quick look," {he} said. {He} went {danger}. At first, it was
[exciting|fun]. But then {accident} "Help! Help!" {hero} cried. {He} was very scared.

{friend}, {a:kind2}, heard the cry. {He2} [ran as fast as {he2} could|did not wait]. "Hold on, {hero}!" called
{friend}. {He2} {saving}. Soon {hero} was safe. {thanks}

{hero} went home and told {elder} what happened. "I am sorry. I did not listen," {he} said. {Elder} gave {him} a
[long|big|warm] hug. "I am just happy that you are safe," {he3} said. [From that day on, {hero} listened to
{elder}.|{hero} learned that rules keep us safe.|{hero} never went {danger} again.]
""",
    ("danger", "accident", "saving"),
    (
        ("on the old bridge", "a board broke, and {his} foot got stuck.", "pulled {him} out with both arms"),
        ("into the dark cave", "{he} could not find the way out.", "came with a bright lamp and led {him} out"),
        ("to the muddy swamp", "{he} sank into the mud up to {his} knees.", "threw {him} a long rope"),
        ("on the frozen pond", "the ice went crack.", "pushed a long branch to {him}"),
        ("up the steep hill", "{he} slipped and could not climb back down.", "showed {him} where to step"),
        ("near the fast river", "{he} slipped and fell into the water.", "held out a long stick to {him}"),
        ("into the old shed", "the door closed and would not open.", "found the key and opened the door"),
        ("up the tall ladder", "the ladder fell, and {he} could not get down.", "put the ladder back up"),
    ),
)

GIFT = Plot(
    """
{open}[ {habit}|] Soon it was a special day for {elder}. {hero} wanted to give {him3} a gift, but {he} had no money.
"I know! I will make {gift}," said {hero}.

But first {he} needed {material}. {He} looked {at_place}, but there was nothing. {unhappy} {meet} "I have {material},"
said {friend}. "[You can have it|I will give it to you] if you help me [clean up|carry my {goods}|find my {thing}]."

"Yes, I will!" said {hero}. [They worked hard all day.|They worked until noon.] Then {friend} gave {him} {material}.
{hero} [ran|hurried] home and made {gift}. It was not perfect, but {he} made it with love.

{Elder} [opened {his3} eyes wide|could not believe it]. "{Gift}! It is the best gift I ever got," {he3} said and
[hugged|kissed] {him}. [The best gifts come from the heart.|{hero} learned that a gift does not have to cost
anything.|{He} was glad that {he} worked so hard.]
""",
    ("gift", "material"),
    (
        ("a necklace", "some string"),
        ("a crown of flowers", "some ribbon"),
        ("a warm scarf", "some soft wool"),
        ("a pretty card", "some paper"),
        ("a small boat", "a piece of wood"),
        ("an apple pie", "some flour"),
        ("a soft pillow", "some cloth"),
    ),
)

SEED = Plot("""
{open}[ {habit}|] {day}, {elder} gave {him} a tiny seed. "[Plant it and wait|Take good care of it], and you will see
something wonderful," said {elder}.

{hero} put the seed into the ground {bed}. {He} gave it water. Then {he} sat and watched. Nothing happened. "[Why is
it so slow?|Grow, seed, grow!]" said {hero}. The next day, there was still nothing.

{meet} "Maybe it is not a good seed," said {hero}. "[Give it time|Good things are slow]," said {friend}. "While we
wait, we can {hobby}." So they played, and every [morning|evening] they gave the seed some water.

After many days, {hero} saw a small green leaf. "Look, {friend}! It is growing!" {he} called. The plant grew and grew.
At last, there was {a:plant} on it, [bigger than a hat|as bright as the sun|the prettiest of all]. {glad} [{hero}
learned that good things take time.|"You waited so well," said {elder}.|{He} gave one seed to {friend}, so that {he2}
could plant it, too.]
""")

RACE = Plot("""
{open} {He} was the fastest {species} of all. {day}, there was a big race {at_place}. The prize was {a:thing}. "I will
win that prize," said {hero}. {friend}, {a:kind2}, wanted to win, too.

"One, two, three, go!" called {elder}. Everyone ran. {hero} ran [like the wind|as fast as {he} could]. Soon {he} was
in front. {He} could see the end of the race. Then {he} heard a cry. {friend} was on the ground, holding {his2} leg.

{hero} looked at the prize. {He} looked at {friend}. Then {he} turned around and [ran|went] back. "[Lean on me|Take my
hand]," said {hero}. "But you will lose the race," said {friend}. "[You are more important|I do not care about that],"
said {hero}. They walked to the end together, slowly, step by step.

They were last, but everyone [clapped|cheered] for them. {Elder} gave the {thing} to both of them. "{reason}," {he3}
said. [It is good to win, but it is better to be kind.|{hero} learned that a friend is the best prize.|After that,
{hero} and {friend} were best friends.]
""")

WISH = Plot(
    """
{open}[ {habit}|] {day}, {hero} found {a:thing} {spot}. It began to glow! "I am a magic {thing}," it said. "You may
make one wish."

{hero} thought for a long time. "I wish {wish}!" {he} said. [Poof!|There was a flash of light.] The wish came true. At
first, {hero} was [very happy|so excited]. But soon {trouble} {unhappy}

{meet} {ask} {friend}. {hero} told {him2} about the wish. "[Let us ask the {thing} for help|Maybe the {thing} can take
it back]," said {friend}. They [ran|hurried] to the magic {thing}. "Please make everything the way it was before,"
said {hero}.

[Poof!|There was a second flash of light.] Everything was the same as before. {hero} [hugged|thanked] {friend}.
"{moral}," {he} said. {together}
""",
    ("wish", "trouble", "moral"),
    (
        ("to be as tall as a tree", "{he} could not fit through the door.", "I am just the right size"),
        ("to be very small", "{he} was lost in the long grass.", "I am just the right size"),
        ("that it was always night", "nobody could play outside.", "I love the sun"),
        ("that it never rained", "all the flowers became dry and brown.", "The rain is good for us"),
        ("for a hundred balls", "there was no room left for {him}.", "A few things are enough"),
        ("to fly like a bird", "{he} was too high up and could not come down.", "I like it here on the ground"),
        ("that I never have to sleep", "{he} was tired, but could not close {his} eyes.", "A good nap is nice"),
    ),
)

PLOTS = (LOST, SHARING, FEAR, RESCUE, SKILL, TRUTH, WEATHER_TURN, NEW_FRIEND, FORBIDDEN, GIFT, SEED, RACE, WISH)
