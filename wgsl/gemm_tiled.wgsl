// GEMM with both operands staged in workgroup memory as [k][row] and [k][column]:
// a workgroup computes {{ bm }} x {{ bn }}, {{ bk }} deep at a time, an invocation {{ tm }} x {{ tn }} of it as {{ tm // 4 }} x {{ tn // 4 }} blocks of 4 x 4,
// blocks strided over the tile so that neighbours read neighbouring vec4s. With `split`, layer z of the grid sums part z of K alone.
{% set am = bm // 4 %}
{% set bn4 = bn // 4 %}
{% set ty = bm // tm %}
{% set tx = bn // tn %}
{% set threads = tx * ty %}
var<workgroup> tile_a: array<vec4<f32>, {{ bk * am }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ bk * bn4 }}>;

@compute @workgroup_size({{ threads }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    // Neighbours form clusters of 8 x 4, which read 8 + 4 vec4s of a row of the tiles together.
    let cluster = lid / 32u;
    let x = cluster % {{ tx // 8 }}u * 8u + lid % 8u;
    let y = cluster / {{ tx // 8 }}u * 4u + lid % 32u / 8u;
    let row0 = wid.y * {{ am }}u;
    let col0 = wid.x * {{ bn4 }}u;
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    var c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
{# Layer z of the grid computes product z of a batch, or part z of K. #}
{% set a_above = "wid.z * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_above = "wid.z * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{# An operand stored with k along its columns: 4 x 4 blocks, turned in registers. Padding behind K is zero. #}
{% macro fetch_turned(name, blocks, above, first, count, declare) %}
{% for q in range((bk // 4 * blocks + threads - 1) // threads) %}
{% for r in range(4) %}
        {{ declare }}{{ name }}_next{{ q }}_{{ r }} = {{ name }}_load(({{ above }}min(4u * ({{ first }} + min(lid + {{ q * threads }}u, {{ bk // 4 * blocks - 1 }}u) / {{ bk // 4 }}u) + {{ r }}u, {{ count - 1 }}u)) * {{ name }}_stride + k0 / 4u + lid % {{ bk // 4 }}u);
{% endfor %}
{% endfor %}
{% endmacro %}
{% macro stage_turned(name, blocks) %}
{% for q in range((bk // 4 * blocks + threads - 1) // threads) %}
        {
            let q = lid + {{ q * threads }}u;
{% if (q + 1) * threads > bk // 4 * blocks %}
            if (q < {{ bk // 4 * blocks }}u) {
{% endif %}
            let kb = q % {{ bk // 4 }}u;
            let block = q / {{ bk // 4 }}u;
{% for c in range(4) %}
            tile_{{ name }}[(4u * kb + {{ c }}u) * {{ blocks }}u + block] = vec4<f32>({{ name }}_next{{ q }}_0[{{ c }}], {{ name }}_next{{ q }}_1[{{ c }}], {{ name }}_next{{ q }}_2[{{ c }}], {{ name }}_next{{ q }}_3[{{ c }}]);
{% endfor %}
{% if (q + 1) * threads > bk // 4 * blocks %}
            }
{% endif %}
        }
{% endfor %}
{% endmacro %}
{# An operand stored with k along its rows; rows behind K do not exist. #}
{% macro fetch_straight(name, blocks, above, first, declare) %}
{% for q in range((bk * blocks + threads - 1) // threads) %}
{% set row = "k0 + min(lid + " ~ q * threads ~ "u, " ~ (bk * blocks - 1) ~ "u) / " ~ blocks ~ "u" %}
{% set at = "min(" ~ first ~ " + (lid + " ~ q * threads ~ "u) % " ~ blocks ~ "u, " ~ name ~ "_stride - 1u)" %}
{% if k % bk == 0 %}
        {{ declare }}{{ name }}_next{{ q }} = {{ name }}_load(({{ above }}{{ row }}) * {{ name }}_stride + {{ at }});
{% else %}
        {{ declare }}{{ name }}_next{{ q }} = select(vec4<f32>(), {{ name }}_load(({{ above }}min({{ row }}, {{ k - 1 }}u)) * {{ name }}_stride + {{ at }}), {{ row }} < {{ k }}u);
{% endif %}
{% endfor %}
{% endmacro %}
{% macro stage_straight(name, blocks) %}
{% for q in range((bk * blocks + threads - 1) // threads) %}
{% if (q + 1) * threads > bk * blocks %}
        if (lid + {{ q * threads }}u < {{ bk * blocks }}u) {
            tile_{{ name }}[lid + {{ q * threads }}u] = {{ name }}_next{{ q }};
        }
{% else %}
        tile_{{ name }}[lid + {{ q * threads }}u] = {{ name }}_next{{ q }};
{% endif %}
{% endfor %}
{% endmacro %}
{% macro fetch(declare) %}
{% if trans == "TN" %}
{{ fetch_straight("a", am, a_above, "row0", declare) }}
{% else %}
{{ fetch_turned("a", am, a_above, "row0", m, declare) }}
{% endif %}
{% if trans == "NT" %}
{{ fetch_turned("b", bn4, b_above, "col0", n, declare) }}
{% else %}
{{ fetch_straight("b", bn4, b_above, "col0", declare) }}
{% endif %}
{% endmacro %}
{# The tile of the next step is fetched into registers before the current one is multiplied. Behind the last step the last is fetched again. #}
{% if split %}
    let begin = wid.z * {{ chunk }}u;
    let end = min(begin + {{ chunk }}u, {{ k }}u);
{% else %}
    let begin = 0u;
    let end = {{ k }}u;
{% endif %}
    var k0 = begin;
{{ fetch("var ") }}
    for (var step = begin; step < end; step += {{ bk }}u) {
{% if trans == "TN" %}
{{ stage_straight("a", am) }}
{% else %}
{{ stage_turned("a", am) }}
{% endif %}
{% if trans == "NT" %}
{{ stage_turned("b", bn4) }}
{% else %}
{{ stage_straight("b", bn4) }}
{% endif %}
        k0 = min(step + {{ bk }}u, {{ (k - 1) // bk * bk }}u);
{{ fetch("") }}
        workgroupBarrier();
{% for kk in range(bk) %}
        {
{% for i in range(tm // 4) %}
            let a{{ i }} = tile_a[{{ kk * am + i * ty }}u + y];
{% endfor %}
{% for j in range(tn // 4) %}
            let b{{ j }} = tile_b[{{ kk * bn4 + j * tx }}u + x];
{% endfor %}
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
            c{{ i }}_{{ j }} += a{{ i // 4 }}[{{ i % 4 }}] * b{{ j }};
{% endfor %}
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
    }
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
