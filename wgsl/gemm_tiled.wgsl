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
    let x = lid % {{ tx }}u;
    let y = lid / {{ tx }}u;
    let row0 = wid.y * {{ am }}u;
    let col0 = wid.x * {{ bn4 }}u;
{% for i in range(tm) %}
{% for j in range(tn // 4) %}
    var c{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
{# Stages an operand stored with k along its columns: 4 x 4 blocks, turned in registers. Padding behind K is zero. #}
{# Layer z of the grid computes product z of a batch, or part z of K. #}
{% set a_above = "wid.z * " ~ a_rows ~ "u + " if batch > 1 else "" %}
{% set b_above = "wid.z * " ~ b_rows ~ "u + " if batch > 1 else "" %}
{% macro turned(name, blocks, above, first, count) %}
{% for q in range((bk // 4 * blocks + threads - 1) // threads) %}
        {
            let q = lid + {{ q * threads }}u;
{% if (q + 1) * threads > bk // 4 * blocks %}
            if (q < {{ bk // 4 * blocks }}u) {
{% endif %}
            let kb = q % {{ bk // 4 }}u;
            let block = q / {{ bk // 4 }}u;
            let at = k0 / 4u + kb;
{% for r in range(4) %}
            let v{{ r }} = {{ name }}_load(({{ above }}min(4u * ({{ first }} + block) + {{ r }}u, {{ count - 1 }}u)) * {{ name }}_stride + at);
{% endfor %}
{% for c in range(4) %}
            tile_{{ name }}[(4u * kb + {{ c }}u) * {{ blocks }}u + block] = vec4<f32>(v0[{{ c }}], v1[{{ c }}], v2[{{ c }}], v3[{{ c }}]);
{% endfor %}
{% if (q + 1) * threads > bk // 4 * blocks %}
            }
{% endif %}
        }
{% endfor %}
{% endmacro %}
{# Stages an operand stored with k along its rows; rows behind K do not exist. #}
{% macro straight(name, blocks, above, first) %}
{% for q in range((bk * blocks + threads - 1) // threads) %}
        {
            let q = lid + {{ q * threads }}u;
{% if (q + 1) * threads > bk * blocks %}
            if (q < {{ bk * blocks }}u) {
{% endif %}
            let kk = k0 + q / {{ blocks }}u;
            let at = min({{ first }} + q % {{ blocks }}u, {{ name }}_stride - 1u);
{% if k % bk == 0 %}
            tile_{{ name }}[q] = {{ name }}_load(({{ above }}kk) * {{ name }}_stride + at);
{% else %}
            var v = vec4<f32>();
            if (kk < {{ k }}u) {
                v = {{ name }}_load(({{ above }}kk) * {{ name }}_stride + at);
            }
            tile_{{ name }}[q] = v;
{% endif %}
{% if (q + 1) * threads > bk * blocks %}
            }
{% endif %}
        }
{% endfor %}
{% endmacro %}
{% if split %}
    let begin = wid.z * {{ chunk }}u;
    let end = min(begin + {{ chunk }}u, {{ k }}u);
    for (var k0 = begin; k0 < end; k0 += {{ bk }}u) {
{% else %}
    for (var k0 = 0u; k0 < {{ k }}u; k0 += {{ bk }}u) {
{% endif %}
{% if trans == "TN" %}
{{ straight("a", am, a_above, "row0") }}
{% else %}
{{ turned("a", am, a_above, "row0", m) }}
{% endif %}
{% if trans == "NT" %}
{{ turned("b", bn4, b_above, "col0", n) }}
{% else %}
{{ straight("b", bn4, b_above, "col0") }}
{% endif %}
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
