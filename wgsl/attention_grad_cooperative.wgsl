// Gradients of attention on matrix units: for the queries ("query"), with dy y of every query, or for keys and values ("key"). Probabilities are
// computed again from the statistics.
//
// A subgroup has {{ lanes }} rows of its own, queries or keys, one per invocation for all that is not a product. It goes through the rows of the other
// kind, {{ tile }} at a time. a x^T are scores, b y^T derivatives by probabilities; a, x and b, y are q, k and dy, v, or the other way round. Both
// pass through workgroup memory to the invocation of their row; probabilities and derivatives by scores pass back and are multiplied by y and x.
// Those sums stay in matrices.
{# Inside: rows of both kinds are clamped to the sample's last, columns of a head to its last. own_row, other, t stay below the tile's rows, matrices
   inside the tile: wide is a multiple of size. Statistics have 2·total elements in two rows of their stride, dots has total. What is stored belongs
   to a row below own_len; columns are those of the head, or, for the last head, the row's padding. #}
{% set key = kind == "key" %}
{% set own_len = k_len if key else q_len %}
{% set other_len = q_len if key else k_len %}
{% set keys = "q" if packed else "kv" %}
{% set a, a_first = (keys, k_first) if key else ("q", 0) %}
{% set b, b_first = (keys, v_first) if key else ("dy", 0) %}
{% set x, x_first = ("q", 0) if key else (keys, k_first) %}
{% set y, y_first = ("dy", 0) if key else (keys, v_first) %}
{% set out, columns = ("dkv", v_first + heads * d) if key else ("dq", heads * d) %}
{% set threads = subgroups * lanes %}
{% set wide = (4 * d + size - 1) // size * size %}
{% set row = wide + pad %}
{% set p_row = tile + pad %}
{% set s_row = tile + 4 %}
{% set chunks = (wide + tile - 1) // tile %}
{# Elements of workgroup memory an index counts: MSL reads matrices from arrays of scalars only. #}
{% set each = 1 if scalar else 4 %}
{% set element = "f16" if scalar else "vec4<f16>" %}
{% set mt = lanes // size %}
{% set nt = tile // size %}
{% set depth = wide // size %}
{% set matrix = "coop_mat" ~ size ~ "x" ~ size %}
{% set hidden = (masked and not key) or other_len % tile != 0 %}
var<workgroup> x_tile: array<{{ element }}, {{ tile * row // each }}>;
var<workgroup> y_tile: array<{{ element }}, {{ tile * row // each }}>;
// First a and b; then derivatives by scores, and probabilities.
var<workgroup> ds_tile: array<{{ element }}, {{ threads * p_row // each }}>;
var<workgroup> p_tile: array<{{ element }}, {{ threads * p_row // each }}>;
var<workgroup> s_tile: array<{{ "f32" if scalar else "vec4<f32>" }}, {{ threads * s_row // each }}>;
var<workgroup> t_tile: array<{{ "f32" if scalar else "vec4<f32>" }}, {{ threads * s_row // each }}>;
{% if key %}
var<workgroup> tops: array<vec4<f32>, {{ tile // 4 }}>;
var<workgroup> inverses: array<vec4<f32>, {{ tile // 4 }}>;
var<workgroup> means: array<vec4<f32>, {{ tile // 4 }}>;
{% elif hidden %}
var<workgroup> there: array<vec4<u32>, {{ tile // 4 }}>;
{% endif %}
{% macro put(name, at, value) %}
{% if scalar %}
        {
            let place = {{ at }};
            let four = {{ value }};
            {{ name }}[place] = four.x;
            {{ name }}[place + 1u] = four.y;
            {{ name }}[place + 2u] = four.z;
            {{ name }}[place + 3u] = four.w;
        }
{% else %}
        {{ name }}[({{ at }}) / 4u] = {{ value }};
{% endif %}
{% endmacro %}
{% macro four(name, at) %}{% if scalar %}vec4<f32>({{ name }}[{{ at }}], {{ name }}[{{ at }} + 1u], {{ name }}[{{ at }} + 2u], {{ name }}[{{ at }} + 3u]){% else %}{{ name }}[({{ at }}) / 4u]{% endif %}{% endmacro %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{% include "shared/tile" %}
    let batch = wid.z;
    let head = wid.y;
    let begin0 = wid.x * {{ threads }}u;
    let column = head * {{ d }}u;
    let sub_row = subgroup * {{ lanes }}u;
    let own = sub_row + lane;
    let number = begin0 + own;
    let own_row = batch * {{ own_len }}u + min(number, {{ own_len - 1 }}u);
{# Own rows pass through the places of derivatives and probabilities, as many columns at a time. Loops are unrolled: loads are under way before
   the first one is waited for. #}
{% for chunk in range(chunks) %}
{% set first_cell = chunk * tile // 4 %}
{% set own_loads = [tile, wide - chunk * tile]|min // 4 %}
    {
{% for r in range(own_loads) %}
        let i{{ r }} = (lid + {{ r * threads }}u) / {{ own_loads }}u;
        let c{{ r }} = {{ first_cell }}u + (lid + {{ r * threads }}u) % {{ own_loads }}u;
        let row{{ r }} = batch * {{ own_len }}u + min(begin0 + i{{ r }}, {{ own_len - 1 }}u);
        let at{{ r }} = column + {% if wide != 4 * d %}min(c{{ r }}, {{ d - 1 }}u){% else %}c{{ r }}{% endif %};
        let a{{ r }} = {{ a }}[row{{ r }} * {{ a }}_stride + {{ a_first }}u + at{{ r }}];
        let b{{ r }} = {{ b }}[row{{ r }} * {{ b }}_stride + {{ b_first }}u + at{{ r }}];
{% endfor %}
{% if chunk > 0 %}
        workgroupBarrier();
{% endif %}
{% for r in range(own_loads) %}
{% for from, tile_of in [("a", "ds_tile"), ("b", "p_tile")] %}
{{ put(tile_of, "i" ~ r ~ " * " ~ p_row ~ "u + 4u * (c" ~ r ~ " - " ~ first_cell ~ "u)", from ~ r if wide == 4 * d else "select(vec4<f16>(), " ~ from ~ r ~ ", c" ~ r ~ " < " ~ d ~ "u)") }}
{% endfor %}
{% endfor %}
    }
    workgroupBarrier();
{% for u in range(chunk * tile // size, (chunk * tile + 4 * own_loads) // size) %}
{% for i in range(mt) %}
{% for from, tile_of in [("a", "ds_tile"), ("b", "p_tile")] %}
    let {{ from }}{{ i }}_{{ u }} = coopLoadT<{{ matrix }}<f16, A>>(&{{ tile_of }}[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size - chunk * tile }}u) / {{ each }}u], {{ p_row // each }}u);
{% endfor %}
{% endfor %}
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
{% for n in range(depth) %}
    var dx{{ i }}_{{ n }} = {{ matrix }}<f32, C>();
{% if key %}
    var dy{{ i }}_{{ n }} = {{ matrix }}<f32, C>();
{% endif %}
{% endfor %}
{% endfor %}
{% if key %}
{% if masked %}
    let counts = mask_at(own_row) != 0.0;
{% endif %}
{% else %}
    let n = (batch * {{ heads }}u + head) * {{ q_len }}u + min(number, {{ q_len - 1 }}u);
    var dots = 0.0;
{% for c in range(d) %}
    let dy{{ c }} = dy_load(own_row * dy_stride + column + {{ c }}u);
    let out{{ c }} = out_load(own_row * out_stride + column + {{ c }}u);
{% endfor %}
{% for c in range(d) %}
    dots += dot(dy{{ c }}, out{{ c }});
{% endfor %}
    let largest = stats_at(n);
    let inverse = stats_at(stats_stride + n);
{% endif %}
{# Which elements of a step's rows an invocation loads. #}
{% set loads = (tile * wide // 4 + threads - 1) // threads %}
{% set whole = loads * threads == tile * wide // 4 %}
{% for r in range(loads) %}
    let t{{ r }} = {% if whole %}lid + {{ r * threads }}u{% else %}min(lid + {{ r * threads }}u, {{ tile * wide // 4 - 1 }}u){% endif %};
    let i{{ r }} = t{{ r }} / {{ wide // 4 }}u;
    let c{{ r }} = t{{ r }} % {{ wide // 4 }}u;
    let place{{ r }} = column + {% if wide != 4 * d %}min(c{{ r }}, {{ d - 1 }}u){% else %}c{{ r }}{% endif %};
    var x_next{{ r }}: vec4<f16>;
    var y_next{{ r }}: vec4<f16>;
    var is_there{{ r }}: bool;
{% endfor %}
{% macro load(begin) %}
{% for r in range(loads) %}
        {
            let row = batch * {{ other_len }}u + min({{ begin }} + i{{ r }}, {{ other_len - 1 }}u);
            x_next{{ r }} = {{ x }}[row * {{ x }}_stride + {{ x_first }}u + place{{ r }}];
            y_next{{ r }} = {{ y }}[row * {{ y }}_stride + {{ y_first }}u + place{{ r }}];
            is_there{{ r }} = {{ begin }} + i{{ r }} < {{ other_len }}u{% if masked and not key %} && mask_at(row) != 0.0{% endif %}{% if wide != 4 * d %} && c{{ r }} < {{ d }}u{% endif %};
        }
{% endfor %}
{% endmacro %}
{# Others that no own row of this workgroup sees are left out. #}
    let begin = {% if causal and key %}begin0 / {{ tile }}u * {{ tile }}u{% else %}0u{% endif %};
    let end = {% if causal and not key %}min(begin0 + {{ threads }}u, {{ other_len }}u){% else %}{{ other_len }}u{% endif %};
{{ load("begin") }}
    for (var other0 = begin; other0 < end; other0 += {{ tile }}u) {
        workgroupBarrier();
{% for r in range(loads) %}
{% if not whole %}
        if (lid + {{ r * threads }}u < {{ tile * wide // 4 }}u) {
{% endif %}
{% for from, tile_of in [("x", "x_tile"), ("y", "y_tile")] %}
{{ put(tile_of, "i" ~ r ~ " * " ~ row ~ "u + 4u * c" ~ r, "select(vec4<f16>(), " ~ from ~ "_next" ~ r ~ ", is_there" ~ r ~ ")") }}
{% endfor %}
{% if not whole %}
        }
{% endif %}
{% endfor %}
{% if key or hidden %}
        if (lid < {{ tile // 4 }}u) {
{% if key %}
            var top = vec4<f32>();
            var factor = vec4<f32>();
            var mean = vec4<f32>();
{% for e in range(4) %}
            {
                let query = other0 + 4u * lid + {{ e }}u;
                let n = (batch * {{ heads }}u + head) * {{ q_len }}u + min(query, {{ q_len - 1 }}u);
                top[{{ e }}] = stats_at(n);
                factor[{{ e }}] = select(0.0, stats_at(stats_stride + n), query < {{ q_len }}u);
                mean[{{ e }}] = dots_at(n);
            }
{% endfor %}
            tops[lid] = top;
            inverses[lid] = factor;
            means[lid] = mean;
{% else %}
            var counts = vec4<u32>();
{% for e in range(4) %}
            {
                let other = other0 + 4u * lid + {{ e }}u;
                counts[{{ e }}] = select(0u, 1u, other < {{ k_len }}u{% if masked %} && mask_at(batch * {{ k_len }}u + min(other, {{ k_len - 1 }}u)) != 0.0{% endif %});
            }
{% endfor %}
            there[lid] = counts;
{% endif %}
        }
{% endif %}
{{ load("other0 + " ~ tile ~ "u") }}
        workgroupBarrier();
{% for j in range(nt) %}
        {
{% for i in range(mt) %}
            var s{{ i }} = {{ matrix }}<f32, C>();
            var t{{ i }} = {{ matrix }}<f32, C>();
{% endfor %}
{% for u in range(depth) %}
            let x{{ u }} = coopLoad<{{ matrix }}<f16, B>>(&x_tile[{{ (j * size * row + u * size) // each }}], {{ row // each }}u);
            let y{{ u }} = coopLoad<{{ matrix }}<f16, B>>(&y_tile[{{ (j * size * row + u * size) // each }}], {{ row // each }}u);
{% for i in range(mt) %}
            s{{ i }} = coopMultiplyAdd(a{{ i }}_{{ u }}, x{{ u }}, s{{ i }});
            t{{ i }} = coopMultiplyAdd(b{{ i }}_{{ u }}, y{{ u }}, t{{ i }});
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
            coopStoreT(s{{ i }}, &s_tile[(sub_row * {{ s_row }}u + {{ i * size * s_row + j * size }}u) / {{ each }}u], {{ s_row // each }}u);
            coopStoreT(t{{ i }}, &t_tile[(sub_row * {{ s_row }}u + {{ i * size * s_row + j * size }}u) / {{ each }}u], {{ s_row // each }}u);
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
{% for c in range(tile // 4) %}
        {
            let at = own * {{ s_row }}u + {{ 4 * c }}u;
            let s = {{ four("s_tile", "at") }} * {{ scale }};
            let t = {{ four("t_tile", "at") }};
{% if key %}
            var p = exp(s - tops[{{ c }}]) * inverses[{{ c }}];
{% else %}
            var p = exp(s - largest) * inverse;
{% endif %}
{% if hidden and not key %}
            p = select(vec4<f32>(), p, there[{{ c }}] != vec4<u32>());
{% endif %}
{% if causal %}
            p = select(vec4<f32>(), p, vec4<u32>(0u, 1u, 2u, 3u) + other0 + {{ 4 * c }}u {{ ">=" if key else "<=" }} vec4<u32>(number));
{% endif %}
{% if masked and key %}
            p = select(vec4<f32>(), p, counts);
{% endif %}
{% if key %}
{{ put("p_tile", "own * " ~ p_row ~ "u + " ~ 4 * c ~ "u", "vec4<f16>(p)") }}
            let ds = p * (t - means[{{ c }}]);
{% else %}
            let ds = p * (t - dots);
{% endif %}
{{ put("ds_tile", "own * " ~ p_row ~ "u + " ~ 4 * c ~ "u", "vec4<f16>(ds)") }}
        }
{% endfor %}
        workgroupBarrier();
{% for u in range(nt) %}
        {
{% for i in range(mt) %}
            let ds{{ i }} = coopLoadT<{{ matrix }}<f16, A>>(&ds_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size }}u) / {{ each }}u], {{ p_row // each }}u);
{% if key %}
            let p{{ i }} = coopLoadT<{{ matrix }}<f16, A>>(&p_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size }}u) / {{ each }}u], {{ p_row // each }}u);
{% endif %}
{% endfor %}
{% for n in range(depth) %}
            let x{{ n }} = coopLoadT<{{ matrix }}<f16, B>>(&x_tile[{{ (u * size * row + n * size) // each }}], {{ row // each }}u);
{% if key %}
            let y{{ n }} = coopLoadT<{{ matrix }}<f16, B>>(&y_tile[{{ (u * size * row + n * size) // each }}], {{ row // each }}u);
{% endif %}
{% for i in range(mt) %}
            dx{{ i }}_{{ n }} = coopMultiplyAdd(ds{{ i }}, x{{ n }}, dx{{ i }}_{{ n }});
{% if key %}
            dy{{ i }}_{{ n }} = coopMultiplyAdd(p{{ i }}, y{{ n }}, dy{{ i }}_{{ n }});
{% endif %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
{% for sums, first, factor, name in ([("dx", k_first, scale, "s_tile"), ("dy", v_first, "", "t_tile")] if key else [("dx", 0, scale, "s_tile")]) %}
{% for chunk in range(chunks) %}
{% set cols = [tile, 4 * d - chunk * tile]|min %}
    workgroupBarrier();
{% for n in range(([tile, wide - chunk * tile]|min) // size) %}
{% for i in range(mt) %}
    coopStoreT({{ sums }}{{ i }}_{{ chunk * nt + n }}, &{{ name }}[(sub_row * {{ s_row }}u + {{ i * size * s_row + n * size }}u) / {{ each }}u], {{ s_row // each }}u);
{% endfor %}
{% endfor %}
    workgroupBarrier();
{% for r in range(cols // 4) %}
    {
        let i = (lid + {{ r * threads }}u) / {{ cols // 4 }}u;
        let c = (lid + {{ r * threads }}u) % {{ cols // 4 }}u;
        let at = i * {{ s_row }}u + 4u * c;
        if (begin0 + i < {{ own_len }}u) {
            let row = batch * {{ own_len }}u + begin0 + i;
            let sum = {{ four(name, "at") }}{% if factor %} * {{ factor }}{% endif %};
            {{ out }}_store(row * {{ out }}_stride + {{ first + chunk * tile // 4 }}u + column + c, {% if masked and key %}select(vec4<f32>(), sum, mask_at(row) != 0.0){% else %}sum{% endif %});
        }
    }
{% endfor %}
{% endfor %}
{% endfor %}
    if (number >= {{ own_len }}u) {
        return;
    }
{% if not key %}
    dots_put(n, dots);
    if (n == {{ total - 1 }}u) {
        for (var i = {{ total }}u; i < dots_stride; i++) {
            dots_put(i, 0.0);
        }
    }
{% endif %}
{% if key or not packed %}
    if (head == {{ heads - 1 }}u) {
        for (var i = {{ columns }}u; i < {{ out }}_stride; i++) {
            {{ out }}_store(own_row * {{ out }}_stride + i, vec4<f32>());
        }
    }
{% endif %}
}
