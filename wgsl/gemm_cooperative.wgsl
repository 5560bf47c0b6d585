// GEMM on matrix units: subgroups multiply {{ size }} x {{ size }} matrices whose sums stay in registers. A workgroup computes {{ bm }} x {{ bn }},
// {{ bk }} deep a step, each of its {{ rows * cols }} subgroups {{ wm }} x {{ wn }} of it.
//
// Two things hide the latency of memory, and both are needed (docs/kernels.md has their measured worth). Operands go from storage
// through registers into one of two buffers in workgroup memory: at step i, right behind the only barrier, tile i + 2 goes from
// registers to the buffer that tile i was read from, and the loads of tile i + 3 start. And the matrices of the next multiplication are read from workgroup
// memory before the current one is made: also across the barrier, so that no multiplication waits behind it.
//
// With `windows` the product is a convolution, whose matrix of windows exists in workgroup memory only. "forward": row r, column (tap, c) of A
// is x at `source`, the weight is B. "input": the same of dy, and row (tap, h) of B is row h of the weight at the columns of the
// tap. "weight": row r, column (tap, c) of B is x at `source`, A is dy. Where `whole`, a tile has a single tap (or sample step).
//
// Rows in workgroup memory are {{ pad }} elements apart more than they are long, so that eight rows touch all banks once.
{# Inside: Rows and columns are clamped where the operand is (`start`), whole tiles of an extent that the tile divides need no clamp. Along k:
   where the steps reach beyond what may be read (`masked`), k is clamped before the load; rows of A times B transposed end with zeros up to
   their stride. Windows are read where `source` finds them inside the sample, and k behind K is no row of them. The steps of the pipeline that
   go beyond the last one load the last again. Workgroup memory: line and cell are below the tile's (`divides`), matrices lie inside a
   subgroup's share, sums has a matrix for each subgroup. #}
{% set mt = wm // size %}
{% set nt = wn // size %}
{% set threads = rows * cols * lanes %}
{% set a_lines = bk if trans == "TN" else bm %}
{% set a_cells = (bm if trans == "TN" else bk) // 4 %}
{% set b_lines = bn if trans == "NT" else bk %}
{% set b_cells = (bk if trans == "NT" else bn) // 4 %}
{% set a_row = 4 * a_cells + pad %}
{% set b_row = 4 * b_cells + pad %}
{# Elements of workgroup memory an index counts: MSL reads matrices from arrays of scalars only. #}
{% set each = 1 if scalar else 4 %}
{% set a_loads = a_lines * a_cells // threads %}
{% set b_loads = b_lines * b_cells // threads %}
{% set a_apart = threads // a_cells %}
{% set b_apart = threads // b_cells %}
{% set depth = bk // size %}
{% set last = steps - 1 %}
{% for h in range(2) %}
var<workgroup> tile_a{{ h }}: array<{{ element if scalar else "vec4<" ~ element ~ ">" }}, {{ a_lines * a_row // each }}>;
var<workgroup> tile_b{{ h }}: array<{{ element if scalar else "vec4<" ~ element ~ ">" }}, {{ b_lines * b_row // each }}>;
{% endfor %}
var<workgroup> sums: array<{{ "f32" if scalar else "vec4<f32>" }}, {{ rows * cols * size * size // each }}>;
{% if windows %}
{% include "shared/window" %}
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{% include "shared/tile" %}
    let row0 = wid.y * {{ bm }}u;
    let col0 = wid.x * {{ bn }}u;
    let sub_row = subgroup / {{ cols }}u * {{ wm }}u;
    let sub_col = subgroup % {{ cols }}u * {{ wn }}u;
{# The line that an invocation loads. Short lines are taken in an order in which the stores of half a subgroup touch all banks once. #}
{% macro line(cells, along_k) %}
{%- if element == "f16" and not along_k and cells == 4 -%}
lid / 32u * 8u + lid / 4u % 4u * 2u + lid / 16u % 2u
{%- elif element == "f16" and not along_k and cells == 8 -%}
lid / 64u * 8u + lid / 16u % 4u + lid / 8u % 2u * 4u
{%- else -%}
lid / {{ cells }}u
{%- endif -%}
{% endmacro %}
    let a_line = {{ line(a_cells, trans == "TN") }};
    let a_cell = lid % {{ a_cells }}u;
    let b_line = {{ line(b_cells, trans != "NT") }};
    let b_cell = lid % {{ b_cells }}u;
    let a_to = (a_line * {{ a_row }}u + 4u * a_cell) / {{ each }}u;
    let b_to = (b_line * {{ b_row }}u + 4u * b_cell) / {{ each }}u;
    let k0 = {% if split %}wid.z * {{ steps * bk }}u{% else %}0u{% endif %};
{# Where an invocation's loads of a tile start: of an operand with k along its rows the column, of the others the rows. Places outside the
   operand are replaced by its last row or column, whose products are never stored. #}
{% macro start(name, along_k, above, first, lines, extent, loads, apart) %}
{% if name == "a" and windows in ["forward", "input"] %}
{% for r in range(loads) %}
    let a_start{{ r }} = origin(min({{ first }} + a_line + {{ r * apart }}u, {{ extent - 1 }}u));
{% endfor %}
{% elif name == "b" and windows == "input" %}
    let b_col = min({{ first }} / 4u + b_cell, {{ tap_cells - 1 }}u);
{% elif name == "b" and windows == "weight" %}
    let b_column = min({{ first }} / 4u + b_cell, {{ n // 4 - 1 }}u);
    let b_tap = b_column / {{ cells }}u;
    let b_col = b_column % {{ cells }}u;
{% elif along_k %}
    let {{ name }}_col = min({{ first }} / 4u + {{ name }}_cell, {{ name }}_stride - 1u);
{% elif extent % lines == 0 %}
    let {{ name }}_from = ({{ above }}{{ first }} + {{ name }}_line) * {{ name }}_stride;
{% else %}
{% for r in range(loads) %}
    let {{ name }}_from{{ r }} = ({{ above }}min({{ first }} + {{ name }}_line + {{ r * apart }}u, {{ extent - 1 }}u)) * {{ name }}_stride;
{% endfor %}
{% endif %}
{% endmacro %}
{# Layer z of the grid computes product z of a batch, or part z of K. #}
{% set a_above = "wid.z * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_above = "wid.z * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{{ start("a", trans == "TN", a_above, "row0", bm, m, a_loads, a_apart) }}
{{ start("b", trans != "NT", b_above, "col0", bn, n, b_loads, b_apart) }}
{# Loads tile `t`; `declare` is "var " the first time. Behind the end of K tiles are zero. #}
{% macro load(name, along_k, above, lines, extent, loads, apart, declare) %}
{% if name == "a" and windows in ["forward", "input"] %}
{% if whole %}
        let a_tap = k / {{ 4 * cells }}u;
        let a_column = k % {{ 4 * cells }}u / 4u + a_cell;
{% else %}
        let a_tap = (k / 4u + a_cell) / {{ cells }}u;
        let a_column = (k / 4u + a_cell) % {{ cells }}u;
{% endif %}
{% endif %}
{% for r in range(loads) %}
{% if name == "a" and windows in ["forward", "input"] %}
        let a_source{{ r }} = source(a_start{{ r }}, a_tap);
        {{ declare }}a_next{{ r }} = {{ zero }};
        if (a_source{{ r }}.inside{% if masked %} && k / 4u + a_cell < {{ full_k // 4 }}u{% endif %}) {
            a_next{{ r }} = a[a_source{{ r }}.row * a_stride + a_column];
        }
{% elif name == "b" and windows == "input" %}
{% if whole %}
        let b_tap{{ r }} = min(k / {{ 4 * cells }}u, {{ full_k // (4 * cells) - 1 }}u);
        let b_row{{ r }} = k % {{ 4 * cells }}u + b_line + {{ r * apart }}u;
{% else %}
        let b_k{{ r }} = k + b_line + {{ r * apart }}u;
        let b_tap{{ r }} = min(b_k{{ r }}, {{ full_k - 1 }}u) / {{ 4 * cells }}u;
        let b_row{{ r }} = min(b_k{{ r }}, {{ full_k - 1 }}u) % {{ 4 * cells }}u;
{% endif %}
{% if masked %}
        {{ declare }}b_next{{ r }} = select({{ zero }}, b[b_row{{ r }} * b_stride + b_tap{{ r }} * {{ tap_cells }}u + b_col], k + b_line + {{ r * apart }}u < {{ full_k }}u);
{% else %}
        {{ declare }}b_next{{ r }} = b[b_row{{ r }} * b_stride + b_tap{{ r }} * {{ tap_cells }}u + b_col];
{% endif %}
{% elif name == "b" and windows == "weight" %}
        let b_source{{ r }} = source(origin(k + b_line + {{ r * apart }}u), b_tap);
        {{ declare }}b_next{{ r }} = {{ zero }};
        if (b_source{{ r }}.inside{% if masked %} && k + b_line + {{ r * apart }}u < {{ full_k }}u{% endif %}) {
            b_next{{ r }} = b[b_source{{ r }}.row * b_stride + b_col];
        }
{% elif along_k %}
{% if masked %}
        let {{ name }}_k{{ r }} = k + {{ name }}_line + {{ r * apart }}u;
        {{ declare }}{{ name }}_next{{ r }} = select({{ zero }}, {{ name }}[({{ above }}min({{ name }}_k{{ r }}, {{ full_k - 1 }}u)) * {{ name }}_stride + {{ name }}_col], {{ name }}_k{{ r }} < {{ full_k }}u);
{% else %}
        {{ declare }}{{ name }}_next{{ r }} = {{ name }}[({{ above }}k + {{ name }}_line + {{ r * apart }}u) * {{ name }}_stride + {{ name }}_col];
{% endif %}
{% else %}
{% set from = name ~ "_from" ~ r if extent % lines != 0 else name ~ "_from + " ~ r * apart ~ "u * " ~ name ~ "_stride" %}
{% if masked %}
        let {{ name }}_k{{ r }} = k / 4u + {{ name }}_cell;
        {{ declare }}{{ name }}_next{{ r }} = select({{ zero }}, {{ name }}[{{ from }} + min({{ name }}_k{{ r }}, {{ name }}_stride - 1u)], {{ name }}_k{{ r }} < {{ (full_k + 3) // 4 }}u);
{% else %}
        {{ declare }}{{ name }}_next{{ r }} = {{ name }}[{{ from }} + {{ name }}_cell + k / 4u];
{% endif %}
{% endif %}
{% endfor %}
{% endmacro %}
{% macro store(name, h, loads, apart, stride) %}
{% for r in range(loads) %}
{% if scalar %}
{% for e in range(4) %}
        tile_{{ name }}{{ h }}[{{ name }}_to + {{ r * apart * stride + e }}u] = {{ name }}_next{{ r }}[{{ e }}];
{% endfor %}
{% else %}
        tile_{{ name }}{{ h }}[{{ name }}_to + {{ r * apart * stride // 4 }}u] = {{ name }}_next{{ r }};
{% endif %}
{% endfor %}
{% endmacro %}
{% macro load_both(declare) %}
{{ load("a", trans == "TN", a_above, bm, m, a_loads, a_apart, declare) }}
{{ load("b", trans != "NT", b_above, bn, n, b_loads, b_apart, declare) }}
{% endmacro %}
{% macro store_both(h) %}
{{ store("a", h, a_loads, a_apart, a_row) }}
{{ store("b", h, b_loads, b_apart, b_row) }}
{% endmacro %}
{# Matrices of depth u of buffer h. #}
{% macro matrices(h, u, prefix, declare) %}
{% for i in range(mt) %}
{% if trans == "TN" %}
        {{ declare }}{{ prefix }}a{{ i }} = coopLoad<coop_mat{{ size }}x{{ size }}<{{ element }}, A>>(&tile_a{{ h }}[(sub_row + {{ u * size * a_row + i * size }}u) / {{ each }}u], {{ a_row // each }}u);
{% else %}
        {{ declare }}{{ prefix }}a{{ i }} = coopLoadT<coop_mat{{ size }}x{{ size }}<{{ element }}, A>>(&tile_a{{ h }}[(sub_row * {{ a_row }}u + {{ i * size * a_row + u * size }}u) / {{ each }}u], {{ a_row // each }}u);
{% endif %}
{% endfor %}
{% for j in range(nt) %}
{% if trans == "NT" %}
        {{ declare }}{{ prefix }}b{{ j }} = coopLoad<coop_mat{{ size }}x{{ size }}<{{ element }}, B>>(&tile_b{{ h }}[(sub_col * {{ b_row }}u + {{ j * size * b_row + u * size }}u) / {{ each }}u], {{ b_row // each }}u);
{% else %}
        {{ declare }}{{ prefix }}b{{ j }} = coopLoadT<coop_mat{{ size }}x{{ size }}<{{ element }}, B>>(&tile_b{{ h }}[(sub_col + {{ u * size * b_row + j * size }}u) / {{ each }}u], {{ b_row // each }}u);
{% endif %}
{% endfor %}
{% endmacro %}
{% macro multiply() %}
{% for i in range(mt) %}
{% for j in range(nt) %}
        c{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, c{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
{% endmacro %}
{% macro advance() %}
{% for i in range(mt) %}
        a{{ i }} = next_a{{ i }};
{% endfor %}
{% for j in range(nt) %}
        b{{ j }} = next_b{{ j }};
{% endfor %}
{% endmacro %}
{% for i in range(mt) %}
{% for j in range(nt) %}
    var c{{ i }}_{{ j }} = coop_mat{{ size }}x{{ size }}<f32, C>();
{% endfor %}
{% endfor %}
    var k = k0;
{{ load_both("var ") }}
{{ store_both(0) }}
    k = k0 + {{ [1, last]|min * bk }}u;
    {
{{ load_both("") }}
    }
    workgroupBarrier();
{{ matrices(0, 0, "", "var ") }}
{{ store_both(1) }}
    k = k0 + {{ [2, last]|min * bk }}u;
    {
{{ load_both("") }}
    }
    var t = 3u;
    for (var pair = 0u; pair < {{ steps // 2 }}u; pair++) {
{% for h in range(2) %}
{% for u in range(depth) %}
    {
{% if u == depth - 1 %}
        workgroupBarrier();
{{ store_both(h) }}
        k = k0 + min(t, {{ last }}u) * {{ bk }}u;
{{ load_both("") }}
        t += 1u;
{{ matrices(1 - h, 0, "next_", "let ") }}
{% else %}
{{ matrices(h, u + 1, "next_", "let ") }}
{% endif %}
{{ multiply() }}
{{ advance() }}
    }
{% endfor %}
{% endfor %}
    }
{% if steps % 2 == 1 %}
{% for u in range(depth) %}
    {
{% if u < depth - 1 %}
{{ matrices(0, u + 1, "next_", "let ") }}
{{ multiply() }}
{{ advance() }}
{% else %}
{{ multiply() }}
{% endif %}
    }
{% endfor %}
{% endif %}
{# Single elements of a matrix cannot be reached: sums go through workgroup memory, a matrix of each subgroup at a time. Only a barrier of the
   workgroup orders workgroup memory everywhere: that of a subgroup does not in SPIR-V. #}
    let base = subgroup * {{ size * size }}u;
{% for i in range(mt) %}
{% for j in range(nt) %}
{% if i + j > 0 %}
    workgroupBarrier();
{% endif %}
    coopStoreT(c{{ i }}_{{ j }}, &sums[base / {{ each }}u], {{ size // each }}u);
    workgroupBarrier();
    for (var cell = lane; cell < {{ size * size // 4 }}u; cell += {{ lanes }}u) {
        let row = row0 + sub_row + {{ i * size }}u + cell / {{ size // 4 }}u;
        let col = (col0 + sub_col + {{ j * size }}u) / 4u + cell % {{ size // 4 }}u;
        let at = base + 4u * cell;
        if (row < {{ m }}u && col < {{ width }}u) {
            finish({% if split or batch > 1 %}wid.z * {{ m }}u + {% endif %}row, col, {% if scalar %}vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]){% else %}sums[at / 4u]{% endif %});
        }
    }
{% endfor %}
{% endfor %}
}
