// GEMM with both operands staged in workgroup memory: a workgroup computes {{ bm }} x {{ bn }}, 8 deep at a time, an invocation {{ tm }} x {{ tn }} of it.
// With `split`, layer z of the grid sums part z of K alone.
//
// Two copies of the staged operands take turns, so that a step has one barrier: behind it the registers loaded a step ahead go to the
// copy that nobody reads any more, the loads of the step after that are issued, and the multiply-adds hide them.
//
// An operand that is stored with k along its rows is staged as it is, [k][column]. One with k along its columns is turned into that by
// blocks of 4 x 4 in registers, or, with `keep`, stays as it is, [row][k], and the multiply-adds take four k at a time.
//
// With `windows` the product is a convolution, see gemm_cooperative. `whole`: every 8 of K belong to one tap (or sample), so that places move
// on by a stride, and are looked up anew only where a tap (or sample) begins.
{% set am = bm // 4 %}
{% set bn4 = bn // 4 %}
{% set ty = bm // tm %}
{% set tx = bn // tn %}
{% set threads = tx * ty %}
{% set across = tx // 8 %}
{% set keep_a = keep and trans != "TN" %}
{% set keep_b = keep and trans == "NT" %}
{% set turn_a = not keep and trans != "TN" %}
{% set turn_b = not keep and trans == "NT" %}
{% set steps = (k + 7) // 8 %}
{% set rows = (m + bm - 1) // bm %}
{% set columns = (4 * width + bn - 1) // bn %}
{# In vec4s. #}
{% set a_size = 8 * am %}
{% set b_size = 8 * bn4 %}
var<workgroup> tile_a: array<vec4<f32>, {{ 2 * a_size }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ 2 * b_size }}>;
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
{% set a_moves = a_windows and whole %}
{% set b_moves = (b_windows or b_taps) and whole %}

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
    let first = wid.z * {{ chunk }}u;
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
   outside the operand are read from its last one and never stored. #}
{# Layer z of the grid computes product z of a batch, or part z of K. #}
{% set a_above = "wid.z * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_above = "wid.z * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{% macro prepare(name, above, blocks, begin, size, kept, turned, count, half) %}
{% if turned %}
    let {{ name }}_block = {{ half }} / 2u;
    let {{ name }}_part = {{ half }} % 2u;
{% for r in range(4) %}
{% if name == "a" and a_windows %}
    let a_start{{ r }} = origin(min(4u * ({{ begin }} + a_block) + {{ r }}u, {{ count - 1 }}u));
    var a_source{{ r }} = 0u;
    var a_inside{{ r }} = false;
{% else %}
    var {{ name }}_from{{ r }} = ({{ above }}min(4u * ({{ begin }} + {{ name }}_block) + {{ r }}u, {{ count - 1 }}u)) * {{ name }}_stride + 2u * first + {{ name }}_part;
{% endif %}
    var {{ name }}_next{{ r }} = vec4<f32>();
{% endfor %}
{% if name == "a" and a_windows %}
    var a_cell0 = 2u * first + a_part;
{% endif %}
    // Blocks of the upper half of k change places, or they would lie in the banks of the lower half.
    let {{ name }}_to = 4u * {{ name }}_part * {{ blocks }}u + ({{ name }}_block ^ (4u * {{ name }}_part));
{% else %}
{% for q in range(size // threads) %}
    let {{ name }}_to{{ q }} = lid + {{ q * threads }}u;
    var {{ name }}_next{{ q }} = vec4<f32>();
{% if kept %}
    // The place of a row in the tile, and which four k are there: of four rows the first half, of the next four the second.
    let {{ name }}_row{{ q }} = {{ name }}_to{{ q }} / 2u;
    let {{ name }}_part{{ q }} = ({{ name }}_to{{ q }} % 2u) ^ (({{ name }}_row{{ q }} >> 2u) & 1u);
{% if name == "b" %}
    let {{ name }}_at{{ q }} = {{ name }}_row{{ q }} % {{ blocks }}u * 4u + {{ name }}_row{{ q }} / {{ blocks }}u;
{% else %}
    let {{ name }}_at{{ q }} = {{ name }}_row{{ q }};
{% endif %}
{% if name == "a" and a_windows %}
    let a_start{{ q }} = origin(min(4u * {{ begin }} + a_at{{ q }}, {{ count - 1 }}u));
    var a_source{{ q }} = 0u;
    var a_inside{{ q }} = false;
    var a_cell{{ q }} = 2u * first + a_part{{ q }};
{% else %}
    var {{ name }}_from{{ q }} = ({{ above }}min(4u * {{ begin }} + {{ name }}_at{{ q }}, {{ count - 1 }}u)) * {{ name }}_stride + 2u * first + {{ name }}_part{{ q }};
{% endif %}
{% elif name == "b" and b_windows %}
    var b_k{{ q }} = first * 8u + b_to{{ q }} / {{ blocks }}u;
    let b_column{{ q }} = min({{ begin }} + b_to{{ q }} % {{ blocks }}u, {{ n // 4 - 1 }}u);
    let b_tap{{ q }} = b_column{{ q }} / {{ cells }}u;
    let b_col{{ q }} = b_column{{ q }} % {{ cells }}u;
{% if b_moves %}
    let b_start{{ q }} = origin(b_k{{ q }});
    var b_inside{{ q }} = false;
    var b_sample{{ q }} = b_start{{ q }}.x;
    var b_step{{ q }} = b_start{{ q }}.y + b_tap{{ q }} * {{ apart }}u;
{% endif %}
{% elif name == "b" and b_taps %}
    var b_k{{ q }} = first * 8u + b_to{{ q }} / {{ blocks }}u;
    let b_col{{ q }} = min({{ begin }} + b_to{{ q }} % {{ blocks }}u, {{ tap_cells - 1 }}u);
{% if b_moves %}
    var b_from{{ q }} = b_row(b_k{{ q }}) + b_col{{ q }};
{% endif %}
{% else %}
    var {{ name }}_k{{ q }} = first * 8u + {{ name }}_to{{ q }} / {{ blocks }}u;
    let {{ name }}_col{{ q }} = min({{ begin }} + {{ name }}_to{{ q }} % {{ blocks }}u, {{ name }}_stride - 1u);
    var {{ name }}_from{{ q }} = ({{ above }}{{ name }}_k{{ q }}) * {{ name }}_stride + {{ name }}_col{{ q }};
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}
{# Four columns of windows: those of cell number `cell` of row `start`, one of K where that has no whole number of steps. #}
{% macro window(r, cell) %}
            {
{% if a_moves %}
                a_next{{ r }} = a_load(a_source{{ r }} + {{ cell }});
{% else %}
                let source = source_row(a_start{{ r }}, {{ cell }} / {{ cells }}u);
                a_next{{ r }} = vec4<f32>();
                if (source != NOWHERE{% if k % 8 != 0 %} && {{ cell }} < {{ k // 4 }}u{% endif %}) {
                    a_next{{ r }} = a_load(source * a_stride + {{ cell }} % {{ cells }}u);
                }
{% endif %}
            }
{% endmacro %}
{# Where the rows of a tap begin, less the cells of the taps before, which `a_cell` counts. What lies outside is read from row 0, and
   becomes zero on its way to workgroup memory, not before, or the load would be waited for here. #}
{% macro find_rows(count) %}
{% for r in range(count) %}
        a_source{{ r }} = source_row(a_start{{ r }}, a_tap);
        a_inside{{ r }} = a_source{{ r }} != NOWHERE;
        a_source{{ r }} = select(0u, a_source{{ r }}, a_inside{{ r }}) * a_stride - a_tap * {{ cells }}u;
{% endfor %}
{% endmacro %}
{% macro load(name, above, size, kept, turned, mine) %}
{% if turned %}
{% if mine %}
        if ({{ mine }}) {
{% endif %}
{% for r in range(4) %}
{% if name == "a" and a_windows %}
{{ window(r, "a_cell0") }}
{% else %}
            {{ name }}_next{{ r }} = {{ name }}_load({{ name }}_from{{ r }});
{% endif %}
{% endfor %}
{% if mine %}
        }
{% endif %}
{% elif name == "a" and a_windows %}
{% for q in range(size // threads) %}
{{ window(q, "a_cell" ~ q) }}
{% endfor %}
{% elif name == "b" and b_windows %}
{% for q in range(size // threads) %}
        {
{% if b_moves %}
            b_inside{{ q }} = b_step{{ q }} < {{ source_each }}u;
            b_next{{ q }} = b_load(select(0u, b_sample{{ q }} + b_step{{ q }}, b_inside{{ q }}) * b_stride + b_col{{ q }});
{% else %}
            let source = source_row(origin(b_k{{ q }}), b_tap{{ q }});
            b_next{{ q }} = vec4<f32>();
            if (source != NOWHERE{% if k % 8 != 0 %} && b_k{{ q }} < {{ k }}u{% endif %}) {
                b_next{{ q }} = b_load(source * b_stride + b_col{{ q }});
            }
{% endif %}
        }
{% endfor %}
{% elif name == "b" and b_taps %}
{% for q in range(size // threads) %}
{% if b_moves %}
        b_next{{ q }} = b_load(b_from{{ q }});
{% elif k % 8 == 0 %}
        b_next{{ q }} = b_load(b_row(b_k{{ q }}) + b_col{{ q }});
{% else %}
        b_next{{ q }} = select(vec4<f32>(), b_load(b_row(b_k{{ q }}) + b_col{{ q }}), b_k{{ q }} < {{ k }}u);
{% endif %}
{% endfor %}
{% elif kept or k % 8 == 0 %}
{# Columns behind K are zero. #}
{% for q in range(size // threads) %}
        {{ name }}_next{{ q }} = {{ name }}_load({{ name }}_from{{ q }});
{% endfor %}
{% else %}
{# Rows behind K do not exist. #}
{% for q in range(size // threads) %}
        {{ name }}_next{{ q }} = select(vec4<f32>(), {{ name }}_load(({{ above }}min({{ name }}_k{{ q }}, {{ k - 1 }}u)) * {{ name }}_stride + {{ name }}_col{{ q }}), {{ name }}_k{{ q }} < {{ k }}u);
{% endfor %}
{% endif %}
{% endmacro %}
{% macro store(name, blocks, size, turned, mine, copy) %}
{% if (name == "a" and a_moves) or (name == "b" and b_moves and b_windows) %}
{% for r in range(4 if turned else size // threads) %}
        {{ name }}_next{{ r }} = select(vec4<f32>(), {{ name }}_next{{ r }}, {{ name }}_inside{{ r }});
{% endfor %}
{% endif %}
{% if turned %}
{% if mine %}
        if ({{ mine }}) {
{% endif %}
{% for c in range(4) %}
            tile_{{ name }}[{{ copy }} + {{ name }}_to + {{ c * blocks }}u] = vec4<f32>({{ name }}_next0[{{ c }}], {{ name }}_next1[{{ c }}], {{ name }}_next2[{{ c }}], {{ name }}_next3[{{ c }}]);
{% endfor %}
{% if mine %}
        }
{% endif %}
{% else %}
{% for q in range(size // threads) %}
        tile_{{ name }}[{{ copy }} + {{ name }}_to{{ q }}] = {{ name }}_next{{ q }};
{% endfor %}
{% endif %}
{% endmacro %}
{# `go` is 0 behind the last step, which is then loaded once more and never used. #}
{% macro advance(name, size, kept, turned) %}
{% if name == "a" and a_windows %}
{% for q in range(1 if turned else size // threads) %}
        a_cell{{ q }} += 2u * go;
{% endfor %}
{% if a_moves %}
        a_cells += 2u * go;
        if (a_cells == {{ cells }}u) {
            a_cells = 0u;
            a_tap += 1u;
{{ find_rows(4 if turned else size // threads) }}
        }
{% endif %}
{% elif name == "b" and (b_windows or b_taps) %}
{% for q in range(size // threads) %}
{% if b_moves and b_taps %}
        b_from{{ q }} += 8u * go * b_stride;
{% elif b_moves %}
        b_step{{ q }} += {{ 8 * times }}u * go;
{% else %}
        b_k{{ q }} += 8u * go;
{% endif %}
{% endfor %}
{% if b_moves %}
        b_rows += 8u * go;
        if (b_rows == {{ 4 * cells if b_taps else rows_each }}u) {
            b_rows = 0u;
{% for q in range(size // threads) %}
{% if b_taps %}
            b_from{{ q }} = b_from{{ q }} + {{ tap_cells }}u - {{ 4 * cells }}u * b_stride;
{% else %}
            b_step{{ q }} -= {{ rows_each * times }}u;
            b_sample{{ q }} += {{ source_each }}u;
{% endif %}
{% endfor %}
        }
{% endif %}
{% elif kept or turned %}
{% for q in range(4 if turned else size // threads) %}
        {{ name }}_from{{ q }} += 2u * go;
{% endfor %}
{% else %}
{% for q in range(size // threads) %}
        {{ name }}_{{ "from" if k % 8 == 0 else "k" }}{{ q }} += go * 8u{% if k % 8 == 0 %} * {{ name }}_stride{% endif %};
{% endfor %}
{% endif %}
{% endmacro %}
{# Blocks of 4 x 4 that are turned: one for each of the first invocations of a, of the last of b. #}
{% set a_mine = "lid < " ~ am * 2 ~ "u" if am * 2 < threads else "" %}
{% set b_mine = "lid >= " ~ (threads - bn4 * 2) ~ "u" if bn4 * 2 < threads else "" %}
{{ prepare("a", a_above, am, "row0", a_size, keep_a, turn_a, m, "(lid % " ~ am * 2 ~ "u)") }}
{{ prepare("b", b_above, bn4, "col0", b_size, keep_b, turn_b, n, "(lid % " ~ bn4 * 2 ~ "u)") }}
{% if a_moves %}
    var a_tap = 2u * first / {{ cells }}u;
    var a_cells = 2u * first % {{ cells }}u;
{{ find_rows(4 if turn_a else a_size // threads) }}
{% endif %}
{% if b_moves %}
    var b_rows = 8u * first % {{ 4 * cells if b_taps else rows_each }}u;
{% endif %}
{% macro load_both() %}
{{ load("a", a_above, a_size, keep_a, turn_a, a_mine) }}
{{ load("b", b_above, b_size, keep_b, turn_b, b_mine) }}
{% endmacro %}
{% macro store_both(a_copy, b_copy) %}
{{ store("a", am, a_size, turn_a, a_mine, a_copy) }}
{{ store("b", bn4, b_size, turn_b, b_mine, b_copy) }}
{% endmacro %}
{% macro advance_both(ahead) %}
        let go = select(0u, 1u, step + {{ ahead }}u < count);
{{ advance("a", a_size, keep_a, turn_a) }}
{{ advance("b", b_size, keep_b, turn_b) }}
{% endmacro %}
{{ load_both() }}
{{ store_both("0u", "0u") }}
    {
        let step = 0u;
{{ advance_both(1) }}
{{ load_both() }}
    }
    var this_a = 0u;
    var this_b = 0u;
{% if keep_a or keep_b %}
    let a_half = 2u * y + ((y >> 2u) & 1u);
    let b_half = 2u * x + ((x >> 2u) & 1u);
    for (var step = 0u; step < count; step++) {
        workgroupBarrier();
        let next_a = {{ a_size }}u - this_a;
        let next_b = {{ b_size }}u - this_b;
{{ store_both("next_a", "next_b") }}
{{ advance_both(2) }}
{{ load_both() }}
{% for part in range(2) %}
        {
{% for i in range(tm) %}
            let a{{ i }} = tile_a[this_a + (a_half ^ {{ part }}u) + {{ 2 * i * ty }}u];
{% endfor %}
{% if keep_b %}
{% for j in range(tn // 4) %}
{% for c in range(4) %}
            let b{{ j }}_{{ c }} = tile_b[this_b + (b_half ^ {{ part }}u) + {{ 2 * (c * bn4 + j * tx) }}u];
{% for kk in range(4) %}
{% for i in range(tm) %}
            c{{ i }}_{{ j }}[{{ c }}] += a{{ i }}[{{ kk }}] * b{{ j }}_{{ c }}[{{ kk }}];
{% endfor %}
{% endfor %}
{% endfor %}
{% endfor %}
{% else %}
{% for kk in range(4) %}
{% for j in range(tn // 4) %}
            let b{{ kk }}_{{ j }} = tile_b[this_b + {{ (4 * part + kk) * bn4 + j * tx }}u + x];
{% endfor %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
            c{{ i }}_{{ j }} += a{{ i }}[{{ kk }}] * b{{ kk }}_{{ j }};
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
        }
{% endfor %}
        this_a = next_a;
        this_b = next_b;
    }
{% else %}
    // What is multiplied next is read from workgroup memory before what is there is multiplied, across the barrier too.
{% if turn_a %}
    let y_upper = y ^ 4u;
{% endif %}
{% if turn_b %}
    let x_upper = x ^ 4u;
{% endif %}
{% macro a_at(copy, kk, i) %}tile_a[{{ copy }} + {{ kk * am + i * ty }}u + {{ "y_upper" if turn_a and kk >= 4 else "y" }}]{% endmacro %}
{% macro b_at(copy, kk, j) %}tile_b[{{ copy }} + {{ kk * bn4 + j * tx }}u + {{ "x_upper" if turn_b and kk >= 4 else "x" }}]{% endmacro %}
    workgroupBarrier();
{% for i in range(tm // 4) %}
    var a{{ i }} = {{ a_at("0u", 0, i) }};
{% endfor %}
{% for j in range(tn // 4) %}
    var b{{ j }} = {{ b_at("0u", 0, j) }};
{% endfor %}
    for (var step = 0u; step < count; step++) {
        let next_a = {{ a_size }}u - this_a;
        let next_b = {{ b_size }}u - this_b;
{{ store_both("next_a", "next_b") }}
{{ advance_both(2) }}
{{ load_both() }}
{% for i in range(tm // 4) %}
        let a0_{{ i }} = a{{ i }};
{% endfor %}
{% for j in range(tn // 4) %}
        let b0_{{ j }} = b{{ j }};
{% endfor %}
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
{% endif %}
{% for i in range(tm) %}
    {
{% if keep_a %}
        let row = 4u * row0 + {{ i * ty }}u + y;
{% else %}
        let row = 4u * (row0 + {{ i // 4 * ty }}u + y) + {{ i % 4 }}u;
{% endif %}
{% for j in range(tn // 4) %}
        let to{{ j }} = col0 + {{ j * tx }}u + x;
        if (row < {{ m }}u && to{{ j }} < {{ width }}u) {
            finish({% if split or batch > 1 %}wid.z * {{ m }}u + {% endif %}row, to{{ j }}, c{{ i }}_{{ j }});
        }
{% endfor %}
    }
{% endfor %}
}
