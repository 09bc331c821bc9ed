"""Hostile answers: texts that would act, lie, hide or break the page if they were shown as some renderer shows them."""

from __future__ import annotations

# What a browser would set if any of them ran is `window.hit`; what would be fetched is under 127.0.0.1:9.
MARKUP = {
    "script": "<script>window.hit = 'script'</script>",
    "script in a paragraph": "before <script>window.hit = 1</script> after",
    "script in mixed case": "<ScRiPt >window.hit = 1</sCrIpT>",
    "script that is not closed": "<script>window.hit = 1",
    "script with a source": "<script src=//127.0.0.1:9/x.js></script>",
    "image handler": "<img src=x onerror=\"window.hit = 'image'\">",
    "image handler with slashes": "<img/src=x/onerror=window.hit=1>",
    "image handler over lines": "<img\nsrc=x\nonerror=window.hit=1\n>",
    "svg handler": "<svg onload=window.hit=1>",
    "svg script": "<svg><script>window.hit=1</script></svg>",
    "svg animation": "<svg><animate onbegin=window.hit=1 attributeName=x dur=1s>",
    "svg use": "<svg><use href='data:image/svg+xml,<svg id=x onload=window.hit=1>#x'></use></svg>",
    "math that turns into markup": "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "math link": "<math href='javascript:window.hit=1'>x</math>",
    "math action": "<math><maction actiontype='statusline#http://a.b' xlink:href='javascript:window.hit=1'>x</maction>",
    "frame": "<iframe src='javascript:window.hit=1'></iframe>",
    "frame with a document": "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "object": "<object data='javascript:window.hit=1'></object><embed src='javascript:window.hit=1'>",
    "form": "<form action='javascript:window.hit=1'><button>Send</button></form>",
    "autofocus": "<input autofocus onfocus=window.hit=1>",
    "details": "<details open ontoggle=window.hit=1>x</details>",
    "style element": "<style>body{display:none} *{background:url(http://127.0.0.1:9/)}</style>",
    "style attribute": "<div style='position:fixed;inset:0;background:red'>over everything</div>",
    "meta refresh": "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "base": "<base href='http://127.0.0.1:9/'><a href='x'>x</a>",
    "template": "<template><img src=x onerror=window.hit=1></template>",
    "noscript": "<noscript><p title='</noscript><img src=x onerror=window.hit=1>'>",
    "textarea": "<textarea><img title='</textarea><img src=x onerror=window.hit=1>'>",
    "comment": "<!-- --!><img src=x onerror=window.hit=1> -->",
    "comment that is not closed": "<!-- everything after this is gone",
    "conditional comment": "<!--[if IE]><script>window.hit=1</script><![endif]-->",
    "character data": "<![CDATA[<img src=x onerror=window.hit=1>]]>",
    "instruction": "<?xml-stylesheet href='javascript:window.hit=1'?>",
    "closing tags": "</div></div></div></body></html><h1>Outside</h1>",
    "closing tags in code": "`</code></pre></div>` and <pre><code>\n</code></pre>",
    "names that shadow the page": "<img name=getElementById><form id=document><input name=cookie></form>",
    "entities of a tag": "&lt;img src=x onerror=window.hit=1&gt; &#60;script&#62;window.hit=1&#60;/script&#62;",
    "entities twice": "&amp;lt;script&amp;gt;window.hit=1&amp;lt;/script&amp;gt;",
    "escaped tag": "\\<script>window.hit=1\\</script>",
    "markup in markup": "**<b onmouseover=window.hit=1>** ~~<i>~~ # <img src=x onerror=window.hit=1>",
    "markup in a table": "|a|b|\n|-|-|\n|<img src=x onerror=window.hit=1>|`<script>|window.hit=1</script>`|",
    "markup in a cell whose pipes are held": (
        "|a|b|\n|-|-|\n|`|<img src=x onerror=window.hit=1>`|$x|</math><script>$|\x01|"
    ),
    "line end with a handler": "<br onclick=window.hit=1> <br/onclick=window.hit=1> <br><br /><BR\n/>",
    "markup in a heading": "# <svg/onload=window.hit=1>\n\n<svg/onload=window.hit=1>\n===",
    "markup in a list": "- <img src=x onerror=window.hit=1>\n  1. <script>window.hit=1</script>",
    "markup in a quote": "> <iframe onload=window.hit=1>\n>> <script>window.hit=1</script>",
    "sign that turns into a tag": (
        "\uff1cscript\uff1ewindow.hit=1\uff1c/script\uff1e \ufe64img src=x onerror=window.hit=1\ufe65"
    ),
    "null in a tag": "<scr\x00ipt>window.hit=1</scr\x00ipt><img src=x one\x00rror=window.hit=1>",
}
LINKS = {
    "javascript": "[click](javascript:window.hit=1)",
    "javascript in mixed case": "[click](JaVaScRiPt:window.hit=1)",
    "javascript in brackets": "[click](<javascript:window.hit=1>)",
    "javascript after space": "[click]( \n javascript:window.hit=1 )",
    "javascript by entity": "[click](javascript&colon;window.hit=1) [click](&#106;avascript:window.hit=1)",
    "javascript by hexadecimal entity": "[click](&#x6A;&#x61;vascript:window.hit=1)",
    "javascript by long entity": "[click](&#0000106avascript:window.hit=1) [click](javascript&#0058;window.hit=1)",
    "javascript with a tab": "[click](java&Tab;script:window.hit=1) [click](java\tscript:window.hit=1)",
    "javascript with a new line": "[click](java&NewLine;script:window.hit=1) [click](<java\nscript:window.hit=1>)",
    "javascript after a control": "[click](\x01javascript:window.hit=1) [click](&#1;javascript:window.hit=1)",
    "javascript with controls": "[click](java\x00script:window.hit=1) [click](\x1bjavascript\x07:window.hit=1)",
    "javascript with an escape": "[click](java\\script:window.hit=1) [click](javascript\\:window.hit=1)",
    "javascript by percent": "[click](javascript%3Awindow.hit=1) [click](%6Aavascript:window.hit=1)",
    "javascript after a mark": "[click](\u200bjavascript:window.hit=1) [click](\ufeffjavascript:window.hit=1)",
    "javascript after a space of another kind": (
        "[click](\u00a0javascript:window.hit=1) [c](\u2028javascript:window.hit=1)"
    ),
    "javascript with a comment": "[click](javascript://example.org/%0awindow.hit=1)",
    "javascript in a feed": "[click](feed:javascript:window.hit=1) [click](view-source:javascript:window.hit=1)",
    "vbscript and others": (
        "[a](vbscript:x) [b](livescript:x) [c](mocha:x) [d](command:x) [e](vscode://x) [f](blob:x) [g](tel:1)"
    ),
    "data": "[click](data:text/html,<script>window.hit=1</script>)",
    "data of an image": "[click](data:image/png;base64,iVBOR) ![drawn](data:image/svg+xml,<svg onload=window.hit=1>)",
    "data in base64": "[click](DATA:text/html;base64,PHNjcmlwdD53aW5kb3cuaGl0PTE8L3NjcmlwdD4=)",
    "file": "[click](file:///etc/passwd) <file:///etc/passwd> [click](\\\\127.0.0.1\\share)",
    "autolink": "<javascript:window.hit=1> <JAVASCRIPT:window.hit=1> <data:text/html,x> <vbscript:x>",
    "autolink with markup": '<http://a.b/"onmouseover=window.hit=1> <http://a.b/?<img src=x onerror=window.hit=1>>',
    "bare address with markup": 'http://a.b/"onmouseover="window.hit=1 https://a.b/<img src=x onerror=window.hit=1>',
    "bare javascript": "javascript:window.hit=1 and data:text/html,x and www.example.org",
    "reference": "[click][a]\n\n[a]: javascript:window.hit=1",
    "reference before its use": "[a]: <javascript:window.hit=1> 'title'\n\n[a] [a][] [click][a]",
    "reference in a quote": "> [a]:\n> data:text/html,x\n\n[a]",
    "reference by entity": "[a]: javascript&colon;window.hit=1\n\n![a] [a]",
    "reference that is far larger than its use": f"[a]: http://a.b/{'x' * 1900}\n\n" + ("[a] " * 100 + "\n\n") * 20,
    "title that breaks out": "[a](http://a.b '\"onmouseover=window.hit=1 x=\"') [b](http://a.b \"' onclick='x\")",
    "target that breaks out": (
        '[a](http://a.b/"onmouseover="window.hit=1) [b](http://a.b/\'><script>window.hit=1</script>)'
    ),
    "text that breaks out": "[<img src=x onerror=window.hit=1>](http://a.b) [</a><script>](http://a.b)",
    "image": "![seen](http://127.0.0.1:9/pixel.png) ![](http://127.0.0.1:9/pixel.png)",
    "image with a handler": '![x](http://a.b "x" onerror=window.hit=1) ![x" onerror="window.hit=1](http://a.b/x)',
    "image of a script": "![x](javascript:window.hit=1) ![x](data:text/html,x) ![x][a]\n\n[a]: javascript:window.hit=1",
    "image in a link": "[![x](http://127.0.0.1:9/x)](javascript:window.hit=1) [![x](javascript:1)](http://a.b)",
    "relative": "[a](/api/shutdown) [b](../tree?x) [c](#top) [d](?reset) [e](page.html) [f]()",
    "no scheme": (
        "[a](//127.0.0.1:9/x) [b](\\\\127.0.0.1:9\\x) [c](/\\127.0.0.1:9) [d](http:x) [e](https:/x) [f](http:\\\\x)"
    ),
    "user in an address": "[a](https://accounts.example@127.0.0.1:9/) <https://example.org:x@127.0.0.1:9/>",
    "text of another address": (
        "[https://bank.example/login](https://127.0.0.1:9/login) [bank.example](http://127.0.0.1:9)"
    ),
    "letters of another script": (
        "[\u0430pple.com](https://\u0430pple.com) <https://\u0430pple.com> https://\u0430pple.com"
    ),
    "dots of another script": (
        "[a](https://bank\u3002example\uff0f.evil.example) <https://bank\u2044example.evil.example>"
    ),
    "mail": "[a](mailto:a@b.example?bcc=c@d.example) <mailto:x@y.example> <x@y.example> [b](mailto:javascript:1)",
    "broken host": "[a](http://[::1) [b](http://[x]/) [c](https://a.b:99999999/) [d](http://%00/) [e](https://.)",
}
FORMULAS = {
    "formula with a link": "$\\href{javascript:window.hit=1}{x}$ \\(\\url{javascript:window.hit=1}\\)",
    "formula with a style": (
        "$$\\style{position:fixed;inset:0;background:red}{x}$$ $\\class{jp-Button}{x}$ $\\cssId{x}{y}$"
    ),
    "formula with markup": "$x<img src=x onerror=window.hit=1>$ \\(</math><script>window.hit=1</script>\\)",
    "formula with markup as text": "$\\text{</mtext></math><img src=x onerror=window.hit=1>}$ $\\text{<script>}$",
    "formula with entities": (
        "$\\text{&lt;img src=x onerror=window.hit=1&gt;}$ $&lt;script&gt;$ $\\text{&#60;script&#62;}$"
    ),
    "formula with a code point": (
        "$\\unicode{x3c}script\\unicode{x3e}$ $\\unicode{x3csvg/onload=window.hit=1}$ $\\unicode{x202e}$"
    ),
    "formula with an attribute": '$\\color{red" onmouseover="window.hit=1}{x}$ $\\textcolor{"><script>}{x}$',
    "formula with a background": "$\\colorbox{url(http://127.0.0.1:9/)}{x}$ $\\fcolorbox{red}{expression(1)}{x}$",
    "formula that is large by a little": "$\\hspace{90em}x\\hspace{-9em}y$ $\\rule{99em}{11em}$",
    "formula that is large": "$\\hspace{9999em}x$ $\\rule{9999em}{9999em}$ $\\kern-9999em x$ $\\raise 9999em{x}$",
    "formula that hides": "$\\color{white}{hidden}$ $\\phantom{hidden}$ $\\llap{over the text before}$",
    "formula with a macro": "$\\newcommand{\\a}{\\a\\a}\\a$ $\\def\\b{\\b\\b}\\b$ $\\let\\c\\href$",
    "formula that doubles": "$"
    + "".join(f"\\DeclareMathOperator{{\\{c}}}{{\\{d}\\{d}}}" for c, d in ["ab", "bc", "cd"])
    + "\\a$",
    "formula that nests": "$"
    + "{" * 900
    + "x"
    + "}" * 900
    + "$ $"
    + "\\sqrt" * 300
    + "x$ $"
    + "x^{" * 300
    + "}" * 300
    + "$",
    "formula that nests without braces": "$"
    + "\\left(" * 200
    + "x"
    + "\\right)" * 200
    + "$ $"
    + "\\frac1" * 300
    + "2$",
    "formula of matrices": "$$" + "\\begin{matrix}" * 60 + "x" + "\\end{matrix}" * 60 + "$$",
    "formula that is broken": (
        "$\\frac$ $\\left($ $x^^y$ $\\begin{matrix}$ $\\sqrt[$ $}{$ $_$ $^$ $\\right.$ $&$ $\\\\$ $\\over$"
    ),
    "formula that is not closed": "$$\n\\frac{1}{2}\n\n<script>window.hit=1</script> \\[ x \\( y $ z",
    "formula that swallows a fence": (
        "$$\n```\n<img src=x onerror=window.hit=1>\n```\n$$ <img src=x onerror=window.hit=1>"
    ),
    "formula of another kind": (
        "\\begin{foo}<script>\\end{foo} $\\begin{document}x\\end{document}$ $\\input{/etc/passwd}$"
    ),
    "formula with marks": "$\\text{\u202eabc\u2066}$ $x\u202ey$ $\\verb|<script>|$ $\\tag{<img>}$",
}
FENCES = {
    "open fence": "```html\n<script>window.hit=1</script>\n<img src=x onerror=window.hit=1>",
    "half a fence": "``\n<script>window.hit=1</script>\n``` ``",
    "fence closed by less": "````\n```\n</code></pre><script>window.hit=1</script>\n```\n",
    "fence of two kinds": "```\n~~~\n<img src=x onerror=window.hit=1>\n```\n~~~\n</pre>",
    "fence with a long language": "```" + "x" * 5000 + "\ncode\n```",
    "fence with a hostile language": (
        '```"><script>window.hit=1</script>\ncode\n```\n~~~js onload=window.hit=1 `x`\ncode\n~~~'
    ),
    "fence with an entity as language": (
        "```&quot;&gt;&lt;img&#32;src=x\ncode\n```\n```constructor\ncode\n```\n```__proto__\nx\n```"
    ),
    "fence in a list": "- item\n  ```html\n  <script>window.hit=1</script>\nafter <script>window.hit=1</script>\n```",
    "fence in a list with a hostile language": (
        '- ```py" onclick="window.hit=1\n  x = 1\n  ```\n- ~~~\'><script>window.hit=1</script>\n  x\n  ~~~'
    ),
    "fence in a quote": "> ```\n> <script>window.hit=1</script>\n<img src=x onerror=window.hit=1>\n",
    "mermaid": (
        '```mermaid\ngraph TD; A[<img src=x onerror=window.hit=1>] --> B; click A "javascript:window.hit=1"\n```'
    ),
    "code between ticks": "`` `<script>`` `window.hit=1</script>` ```<img src=x onerror=window.hit=1>",
    "indented code": "    <script>window.hit=1</script>\n\n\t</code></pre><img src=x onerror=window.hit=1>",
    "code with controls": "```sh\necho \x1b[2J\x1b]0;title\x07 \x08\x08\x9b31m\n```",
    "code that reads otherwise": (
        "```python\nif level != 'user\u202e \u2066# admin\u2069 \u2066':\n    grant()\n```\n`a\u202eb`"
    ),
    "slow code": "```python\n"
    + "'''" * 3000
    + "\n"
    + '"\\' * 3000
    + "\n```\n```html\n"
    + "<!--" * 2000
    + "\n```\n```js\n"
    + "/*" * 3000
    + "\n```",
}
LAYOUT = {
    "giant word": "x" * 50_000,
    "giant line": "word " * 20_000,
    "giant line of code": "```\n" + "x" * 50_000 + "\n```",
    "giant heading": "# " + "heading " * 5_000,
    "giant cell": "|a|b|\n|-|-|\n|" + "x" * 20_000 + "|y|",
    "many columns": "|" * 2_000 + "\n" + "|-" * 1_999 + "|\n" + "|\n" * 500,
    "many empty cells": "|a" * 64 + "|\n" + "|-" * 64 + "|\n" + "|\n" * 500,
    "broken table": "|a|b\n|-|-|-|\n|x\n\n|a|\n|:-:|\n|b|c|d|e|\n||||\n|`|`|\n",
    "deep quote": ">" * 1_000 + " deep <script>window.hit=1</script>",
    "deep list": "\n".join("  " * depth + f"- {depth}" for depth in range(200)),
    "deep list on a line": "- " * 1_000 + "deep",
    "deep emphasis": "*a **b " * 500 + "** *" * 500,
    "deep links": "[" * 500 + "a" + "](http://a.b)" * 500,
    "many brackets": "[" * 5_000 + "]" * 5_000,
    "many references": "[a][" * 2_000 + "]" * 2_000,
    "many images": "![" * 3_000,
    "many ticks": "".join("`" * size + " " for size in range(1, 300)),
    "many entities": "&amp;&#x41;&NotEqualTilde;&nope;" * 1_000,
    "many dollars": "$a " * 5_000 + "$ " * 5_000,
    "many slashes": "\\" * 10_000 + "(" + "\\(" * 3_000 + "\\[\n" * 500,
    "many line ends": "a\n" * 3_000 + "\n" * 5_000 + "\r\n\r" * 500,
    "large number of a list": "999999999. x\n\n0. x\n\n1234567890. x",
    "headings": "# 1\n## 2\n### 3\n#### 4\n##### 5\n###### 6\n####### 7\nsetext\n===\nsetext\n---",
    "right to left": "\u202egnihtemos\u202c \u2066\u2067\u2068\u2069\u202a\u202b\u202d <b>\u202e</b>",
    "right to left by entity": "&#x202E;abc&#8238;def&rlm; &#x2066;x `\u202e` [\u202etxt.exe](http://a.b)",
    "right to left that is not closed": "\u202e\u202e\u202e everything after this, and the next answer",
    "arabic and hebrew": "\u0645\u0631\u062d\u0628\u0627 123 `code` \u05e9\u05dc\u05d5\u05dd (abc) \u200f!\u200e",
    "piled marks": "Z" + "\u0300\u0301\u0302\u0489" * 300 + "algo `x" + "\u20dd" * 200 + "`",
    "invisible signs": "pass\u200bword\u2060\ufeff\u00ad \U000e0041\U000e0042 \u3164\u115f",
    "controls": "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))) + " \x1b[31mred\x1b[0m",
    "controls by entity": "&#0; &#x8; &#27; &#x9b; &#xD800; &#xDFFF; &#x110000; &#xFFFF; &#9; &#10;",
    "half signs": "\ud800 \udfff a\ud83d b\ude00 \ude00\ud83d `\ud83d`",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "wide signs": "\ufdfd\U0001242b" * 300,
    "nothing": "",
    "only spaces": " \t\n \u00a0\n\u3000",
}
HOSTILE = {**MARKUP, **LINKS, **FORMULAS, **FENCES, **LAYOUT}

# Signs of which a megabyte takes time that grows with its length and no faster.
SIGNS = (
    *(
        "[",
        "]",
        "![",
        "*",
        "_",
        "*a ",
        "_a ",
        "**a",
        "~~a ",
        "`",
        "` ",
        "<",
        "<a",
        "&",
        "\\",
        "$",
        "$a ",
        "$$\n",
        "\\(",
    ),
    *(
        "\\[\n",
        "\\begin{align}\n",
        "|",
        "|\n",
        ">",
        "> ",
        ">\n",
        "- ",
        "-\n",
        "1. ",
        "#",
        "# \n",
        "\n",
        " ",
        "\t",
        "```\n",
    ),
    *(
        "a\n",
        "a\n\n",
        "[a](",
        "[a][",
        "[a]: b\n",
        "](",
        "<http://a",
        "http://a.b/",
        "`a|",
        "|`\n|-|\n",
        "<br",
        "%",
        "\u202e",
        "\u0300",
        "\U0001f600",
    ),
)
