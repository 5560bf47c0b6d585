// GEMM with both operands staged in workgroup memory: a workgroup computes {{ bm }} x {{ bn }}, 8 deep at a time, an invocation {{ tm }} x {{ tn }} of it.
// With `split`, layer z of the grid sums part z of K alone, of every product of a batch. An invocation takes at most {{ chunk }} steps, one after
// the other or, where K is long, in blocks of `flush` steps whose sums are kept aside.
//
// Two copies of the staged operands take turns, so that a step has one barrier: behind it the registers loaded a step ahead go to the
// copy that nobody reads any more, the loads of the step after that are issued, and the multiply-adds hide them.
//
// An operand that is stored with k along its rows is staged as it is, [k][column]. One with k along its columns is turned into that: an
// invocation loads four k of two neighbouring rows and stores four pairs. Every invocation does the same, without a branch: a branch keeps
// compilers from moving the loads ahead of the multiply-adds that hide them.
//
// With `windows` the product is a convolution, see gemm_cooperative. What lies outside a sample, or behind K, is read from elsewhere and becomes
// zero on its way to workgroup memory, not before, or the load would be waited for.
{% set am = bm // 4 %}
{% set bn4 = bn // 4 %}
{% set ty = bm // tm %}
{% set tx = bn // tn %}
{% set threads = tx * ty %}
{% set across = tx // 8 %}
{% set turn_a = trans != "TN" %}
{% set turn_b = trans == "NT" %}
{% set steps = (k + 7) // 8 %}
{% set rows = (m + bm - 1) // bm %}
{% set columns = (4 * width + bn - 1) // bn %}
{# In vec4s, as all places in a tile but those of pairs. #}
{% set a_size = 8 * am %}
{% set b_size = 8 * bn4 %}
var<workgroup> tile_a: {% if turn_a %}array<vec2<f32>, {{ 4 * a_size }}>{% else %}array<vec4<f32>, {{ 2 * a_size }}>{% endif %};
var<workgroup> tile_b: {% if turn_b %}array<vec2<f32>, {{ 4 * b_size }}>{% else %}array<vec4<f32>, {{ 2 * b_size }}>{% endif %};
{% if windows %}
{% include "shared/window" %}

{% if windows == "input" %}
{# Row k of B: row h of the weight at the columns of a tap. #}
fn b_row(k: u32) -> u32 {
    let at = min(k, {{ k - 1 }}u);
    return at % {{ 4 * cells }}u * b_stride + at / {{ 4 * cells }}u * {{ tap_cells }}u;
}
{% endif %}
{% endif %}
{% set a_windows = windows in ["forward", "input"] %}
{% set b_windows = windows == "weight" %}
{% set b_taps = windows == "input" %}
{% set a_checks = a_windows or (not turn_a and k % 8 != 0) %}
{% set b_checks = b_windows or (not turn_b and k % 8 != 0) %}

@compute @workgroup_size({{ threads }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    // 8 x 4 neighbours read 8 + 4 vec4s: no two that differ are in the same bank.
    let x = lid / 32u % {{ across }}u * 8u + lid % 8u;
    let y = lid / {{ 32 * across }}u * 4u + lid / 8u % 4u;
    // Down {{ order }} tiles, then to the next column of tiles: what runs at a time shares more of both operands than along a row.
    let place = wid.y * {{ columns }}u + wid.x;
    let above = place / {{ order * columns }}u * {{ order }}u;
    let high = min({{ order }}u, {{ rows }}u - above);
    let inside = place % {{ order * columns }}u;
    let row0 = (above + inside % high) * {{ am }}u;
    let col0 = inside / high * {{ bn4 }}u;
{% if split %}
    let first = wid.z{% if batch > 1 %} / {{ batch }}u{% endif %} * {{ chunk }}u;
    let count = min({{ steps }}u - first, {{ chunk }}u);
{% else %}
    let first = 0u;
    let count = {{ steps }}u;
{% endif %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    var c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
{# What an operand needs, by how it is stored: places to load from, registers to load into, their way to workgroup memory. Rows and columns
   outside the operand are read from its last one and never stored; columns behind K are zero, rows behind K do not exist. #}
{# Layer z of the grid computes product z of a batch, or part z of K. #}
{% set product = "wid.z % " ~ batch ~ "u" if split else "wid.z" %}
{% set a_above = product ~ " * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_above = product ~ " * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{% macro prepare(name, above, blocks, begin, size, turned, checks, count) %}
{% if turned %}
    let {{ name }}_pair = {% if size // 2 < threads %}lid % {{ size // 2 }}u{% else %}lid{% endif %} / 2u;
    let {{ name }}_part = lid % 2u;
{% for r in range(2) %}
{% if name == "a" and a_windows %}
    let a_start{{ r }} = origin(min(4u * {{ begin }} + 2u * a_pair + {{ r }}u, {{ count - 1 }}u));
{% else %}
    var {{ name }}_from{{ r }} = ({{ above }}min(4u * {{ begin }} + 2u * {{ name }}_pair + {{ r }}u, {{ count - 1 }}u)) * {{ name }}_stride + 2u * first + {{ name }}_part;
{% endif %}
    var {{ name }}_next{{ r }} = vec4<f32>();
{% endfor %}
{% if name == "a" and a_windows %}
    var a_cell = 2u * first + a_part;
{% endif %}
    // Of the upper half of k, vec4s change places by fours, or they would lie in the banks of the lower half.
    let {{ name }}_to = 8u * {{ name }}_part * {{ blocks }}u + ({{ name }}_pair ^ (8u * {{ name }}_part));
{% else %}
{# An invocation loads from one row, `lanes` columns apart. #}
{% set lanes = threads // 8 %}
    let {{ name }}_line = lid / {{ lanes }}u;
    var {{ name }}_k = 8u * first + {{ name }}_line;
    let {{ name }}_to = {{ name }}_line * {{ blocks }}u + lid % {{ lanes }}u;
{% for q in range(size // threads) %}
    var {{ name }}_next{{ q }} = vec4<f32>();
    let {{ name }}_place{{ q }} = {{ begin }} + lid % {{ lanes }}u + {{ q * lanes }}u;
{% if name == "b" and b_windows %}
    let b_column{{ q }} = min(b_place{{ q }}, {{ n // 4 - 1 }}u);
    let b_tap{{ q }} = b_column{{ q }} / {{ cells }}u;
    let b_col{{ q }} = b_column{{ q }} % {{ cells }}u;
{% elif name == "b" and b_taps %}
    let b_col{{ q }} = min(b_place{{ q }}, {{ tap_cells - 1 }}u);
{% else %}
    let {{ name }}_col{{ q }} = min({{ name }}_place{{ q }}, {{ name }}_stride - 1u);
    var {{ name }}_from{{ q }} = ({{ above }}{{ name }}_k) * {{ name }}_stride + {{ name }}_col{{ q }};
{% endif %}
{% endfor %}
{% endif %}
{% if checks %}
{% for r in range(2 if turned else size // threads) %}
    var {{ name }}_inside{{ r }} = false;
{% endfor %}
{% endif %}
{% endmacro %}
{% macro load(name, above, size, turned, mine) %}
{% if name == "a" and a_windows %}
        {
            let tap = a_cell / {{ cells }}u;
{% for r in range(2) %}
            let source{{ r }} = source(a_start{{ r }}, tap);
            a_inside{{ r }} = source{{ r }}.inside{% if k % 8 != 0 %} && a_cell < {{ k // 4 }}u{% endif %};
            a_next{{ r }} = a_load(source{{ r }}.row * a_stride + a_cell % {{ cells }}u);
{% endfor %}
        }
{% elif turned %}
{% if mine %}
        if ({{ mine }}) {
{% endif %}
{% for r in range(2) %}
            {{ name }}_next{{ r }} = {{ name }}_load({{ name }}_from{{ r }});
{% endfor %}
{% if mine %}
        }
{% endif %}
{% elif name == "b" and b_windows %}
        {
{# Behind K there is no row of the windows. #}
            let start = origin({% if k % 8 == 0 %}b_k{% else %}min(b_k, {{ k - 1 }}u){% endif %});
{% for q in range(size // threads) %}
            let source{{ q }} = source(start, b_tap{{ q }});
            b_inside{{ q }} = source{{ q }}.inside{% if k % 8 != 0 %} && b_k < {{ k }}u{% endif %};
            b_next{{ q }} = b_load(source{{ q }}.row * b_stride + b_col{{ q }});
{% endfor %}
        }
{% else %}
{% for q in range(size // threads) %}
{% if name == "b" and b_taps %}
        b_next{{ q }} = b_load(b_row(b_k) + b_col{{ q }});
{% elif k % 8 == 0 %}
        {{ name }}_next{{ q }} = {{ name }}_load({{ name }}_from{{ q }});
{% else %}
        {{ name }}_next{{ q }} = {{ name }}_load(({{ above }}min({{ name }}_k, {{ k - 1 }}u)) * {{ name }}_stride + {{ name }}_col{{ q }});
{% endif %}
{% if k % 8 != 0 %}
        {{ name }}_inside{{ q }} = {{ name }}_k < {{ k }}u;
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}
{% macro store(name, blocks, size, turned, checks, mine, copy) %}
{% if checks %}
{% for r in range(2 if turned else size // threads) %}
        {{ name }}_next{{ r }} = select(vec4<f32>(), {{ name }}_next{{ r }}, {{ name }}_inside{{ r }});
{% endfor %}
{% endif %}
{% if turned %}
{% if mine %}
        if ({{ mine }}) {
{% endif %}
{% for c in range(4) %}
            tile_{{ name }}[2u * {{ copy }} + {{ name }}_to + {{ 2 * c * blocks }}u] = vec2<f32>({{ name }}_next0[{{ c }}], {{ name }}_next1[{{ c }}]);
{% endfor %}
{% if mine %}
        }
{% endif %}
{% else %}
{% for q in range(size // threads) %}
        tile_{{ name }}[{{ copy }} + {{ name }}_to + {{ q * threads // 8 }}u] = {{ name }}_next{{ q }};
{% endfor %}
{% endif %}
{% endmacro %}
{# `go` is 0 behind the last step, which is then loaded once more and never used. #}
{% macro advance(name, size, turned) %}
{% if name == "a" and a_windows %}
        a_cell += 2u * go;
{% elif turned %}
{% for r in range(2) %}
        {{ name }}_from{{ r }} += 2u * go;
{% endfor %}
{% else %}
{% if k % 8 == 0 and not (name == "b" and (b_windows or b_taps)) %}
{% for q in range(size // threads) %}
        {{ name }}_from{{ q }} += go * 8u * {{ name }}_stride;
{% endfor %}
{% else %}
        {{ name }}_k += go * 8u;
{% endif %}
{% endif %}
{% endmacro %}
{# Where a tile has fewer pairs to turn than there are invocations, the first turn those of a and the last those of b. #}
{% set a_mine = "lid < " ~ a_size // 2 ~ "u" if a_size // 2 < threads else "" %}
{% set b_mine = "lid >= " ~ (threads - b_size // 2) ~ "u" if b_size // 2 < threads else "" %}
{{ prepare("a", a_above, am, "row0", a_size, turn_a, a_checks, m) }}
{{ prepare("b", b_above, bn4, "col0", b_size, turn_b, b_checks, n) }}
{% macro load_both() %}
{{ load("a", a_above, a_size, turn_a, a_mine) }}
{{ load("b", b_above, b_size, turn_b, b_mine) }}
{% endmacro %}
{% macro store_both(a_copy, b_copy) %}
{{ store("a", am, a_size, turn_a, a_checks, a_mine, a_copy) }}
{{ store("b", bn4, b_size, turn_b, b_checks, b_mine, b_copy) }}
{% endmacro %}
{% macro advance_both(ahead) %}
        let go = select(0u, 1u, step + {{ ahead }}u < count);
{{ advance("a", a_size, turn_a) }}
{{ advance("b", b_size, turn_b) }}
{% endmacro %}
{{ load_both() }}
{{ store_both("0u", "0u") }}
    {
        let step = 0u;
{{ advance_both(1) }}
{{ load_both() }}
    }
    // What is multiplied next is read from workgroup memory before what is there is multiplied, across the barrier too.
{% if turn_a %}
    let y_upper = y ^ 4u;
{% endif %}
{% if turn_b %}
    let x_upper = x ^ 4u;
{% endif %}
{% macro staged(tile, at, turned) %}{% if turned %}vec4<f32>({{ tile }}[2u * ({{ at }})], {{ tile }}[2u * ({{ at }}) + 1u]){% else %}{{ tile }}[{{ at }}]{% endif %}{% endmacro %}
{% macro a_at(copy, kk, i) %}{{ staged("tile_a", copy ~ " + " ~ (kk * am + i * ty) ~ "u + " ~ ("y_upper" if turn_a and kk >= 4 else "y"), turn_a) }}{% endmacro %}
{% macro b_at(copy, kk, j) %}{{ staged("tile_b", copy ~ " + " ~ (kk * bn4 + j * tx) ~ "u + " ~ ("x_upper" if turn_b and kk >= 4 else "x"), turn_b) }}{% endmacro %}
    workgroupBarrier();
{% for i in range(tm // 4) %}
    var a{{ i }} = {{ a_at("0u", 0, i) }};
{% endfor %}
{% for j in range(tn // 4) %}
    var b{{ j }} = {{ b_at("0u", 0, j) }};
{% endfor %}
    var this_a = 0u;
    var this_b = 0u;
{% if flush > 0 %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    var kept{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
    for (var step = 0u; step < count;) {
    let stop = min(step + {{ flush }}u, count);
    for (; step < stop; step++) {
{% else %}
    for (var step = 0u; step < count; step++) {
{% endif %}
        let next_a = {{ a_size }}u - this_a;
        let next_b = {{ b_size }}u - this_b;
{% for i in range(tm // 4) %}
        let a0_{{ i }} = a{{ i }};
{% endfor %}
{% for j in range(tn // 4) %}
        let b0_{{ j }} = b{{ j }};
{% endfor %}
{{ store_both("next_a", "next_b") }}
{{ advance_both(2) }}
{{ load_both() }}
{% for kk in range(8) %}
{% if kk == 7 %}
        workgroupBarrier();
{% endif %}
{% for i in range(tm // 4) %}
{% if kk == 7 %}
        a{{ i }} = {{ a_at("next_a", 0, i) }};
{% else %}
        let a{{ kk + 1 }}_{{ i }} = {{ a_at("this_a", kk + 1, i) }};
{% endif %}
{% endfor %}
{% for j in range(tn // 4) %}
{% if kk == 7 %}
        b{{ j }} = {{ b_at("next_b", 0, j) }};
{% else %}
        let b{{ kk + 1 }}_{{ j }} = {{ b_at("this_b", kk + 1, j) }};
{% endif %}
{% endfor %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
        c{{ i }}_{{ j }} += a{{ kk }}_{{ i // 4 }}[{{ i % 4 }}] * b{{ kk }}_{{ j }};
{% endfor %}
{% endfor %}
{% endfor %}
        this_a = next_a;
        this_b = next_b;
    }
{% if flush > 0 %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    kept{{ i }}_{{ j }} += c{{ i }}_{{ j }};
    c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
    }
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    c{{ i }}_{{ j }} = kept{{ i }}_{{ j }};
{% endfor %}
{% endfor %}
{% endif %}
{% for i in range(tm) %}
    {
        let row = 4u * (row0 + {{ i // 4 * ty }}u + y) + {{ i % 4 }}u;
{% for j in range(tn // 4) %}
        let to{{ j }} = col0 + {{ j * tx }}u + x;
        if (row < {{ m }}u && to{{ j }} < {{ width }}u) {
            finish({% if split or batch > 1 %}wid.z * {{ m }}u + {% endif %}row, to{{ j }}, c{{ i }}_{{ j }});
        }
{% endfor %}
    }
{% endfor %}
}
